"""The kinds of groups by name. Each is imported when it is wanted."""

from __future__ import annotations

from importlib import import_module

from quire.errors import ConfigError
from quire.kernels.group import Group

GROUPS = {
    "shared_memory": "quire.distributed.shared_memory:SharedMemoryGroup",
    "gloo": "quire.distributed.gloo:GlooGroup",
    "nccl": "quire.distributed.nccl:NcclGroup",
}


def create_group(
    kind: str,
    *,
    rank: int,
    size: int,
    timeout: float,
    descriptor: int = -1,
    address: str = "",
    name: str = "",
    area: range | None = None,
) -> Group:
    """Join a group of `size` ranks. timeout: seconds that a rank may be late.

    descriptor: of the memory that `create_memory` has made (shared_memory); of rank 0's listening socket
    (gloo, nccl). address: HOST:PORT of that socket (gloo, nccl). name: of the group, if several meet there
    (gloo). area: the bytes of the memory that are the group's; None: all.

    Raises `ConfigError`, `WorkerError`.
    """
    if kind not in GROUPS:
        raise ConfigError(f"A group's kind must be one of {', '.join(GROUPS)}, got {kind!r}.")
    module, _, member = GROUPS[kind].partition(":")
    join = getattr(import_module(module), member)
    where: dict[str, object] = {"area": area} if kind == "shared_memory" else {"address": address}
    if kind == "gloo":
        where["name"] = name
    return join(**where, descriptor=descriptor, rank=rank, size=size, timeout=timeout)
