"""Options of KV outside the cache: host memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.options import option
from quire.errors import ConfigError

WRITE_POLICIES = ("write_back", "write_through", "write_through_selective")
FAILURE_POLICIES = ("recompute", "fail")
GIB = 2**30
MOST_GIB = 2**20
STAGING_BYTES = 256 << 20
"""Of each rank with a tier, at most: blocks on their way there."""
DEFAULT_DISK_GIB = 16.0


@dataclass(frozen=True, slots=True)
class KVTiersConfig:
    """KV that the cache has no room for. Off by default: only the cache."""

    swap_space: float | None = option(
        None, "GiB of host memory, for each rank, that hold KV which the cache has dropped."
    )
    kv_offloading_size: float | None = option(
        None, "The same, for all ranks of a replica together. Instead of --swap-space."
    )
    kv_offloading_backend: str = option(
        "native", "Who holds it. native: Quire, compressed.", choices=("native",)
    )
    kv_disk_path: str | None = option(
        None,
        "Directory for KV that outlasts the process. Prompts can be computed back from it: keep it private.",
    )
    kv_disk_size: float | None = option(
        None, f"GiB there, of all ranks and replicas together. Default: {DEFAULT_DISK_GIB:.0f}."
    )
    kv_write_policy: str = option(
        "write_back",
        "When a block is copied to host memory and disk. write_back: when the cache drops it; write_through: "
        "when its request ends; write_through_selective: when a second request uses it.",
        choices=WRITE_POLICIES,
    )
    kv_load_failure_policy: str = option(
        "recompute",
        "If KV cannot be loaded. recompute: it is computed; fail: the request ends with an error.",
        choices=FAILURE_POLICIES,
    )

    def __post_init__(self) -> None:
        for name in ("swap_space", "kv_offloading_size", "kv_disk_size"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < MOST_GIB:
                raise ConfigError(f"{name} is in GiB, from 0 to {MOST_GIB - 1}, got {value}.")
        if self.swap_space and self.kv_offloading_size:
            raise ConfigError(
                f"swap_space ({self.swap_space} GiB for each rank) and kv_offloading_size "
                f"({self.kv_offloading_size} GiB for all) are two sizes of one store; leave one out."
            )
        if self.kv_disk_path == "":
            raise ConfigError("kv_disk_path must not be empty; leave it out for no disk.")
        if self.kv_disk_size is not None and self.kv_disk_path is None:
            raise ConfigError("kv_disk_size needs kv_disk_path: the directory to use.")

    @property
    def has_tiers(self) -> bool:
        return bool(self.swap_space or self.kv_offloading_size or self.disk_bytes)

    def ram_bytes(self, world_size: int) -> int:
        """Of each rank."""
        return int((self.swap_space or (self.kv_offloading_size or 0) / world_size) * GIB)

    @property
    def disk_bytes(self) -> int:
        """Of all ranks; 0: no disk."""
        size = DEFAULT_DISK_GIB if self.kv_disk_size is None else self.kv_disk_size
        return int(size * GIB) if self.kv_disk_path else 0
