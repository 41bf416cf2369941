"""Ranks as actors of a Ray cluster: Ray places them, and that is all. Plans go over their links, so no step
calls Ray, and the end of a link reports a death at once; Ray then says why. An actor ends with its node's
raylet, which Ray itself notices only after a while, and with the engine core.

The ranks of this machine share this process's memory; those of several machines meet through gloo.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

from quire.config import EngineConfig
from quire.distributed import hello
from quire.distributed.links import Link
from quire.errors import ConfigError, QuireError, WorkerError
from quire.executor.death import exit_when_closed
from quire.executor.ranks import Rank
from quire.util.cores import default_threads, physical_cores
from quire.util.environment import child_environment
from quire.util.version import VERSION

RUN = "quire.engine.rank:run_rank"
REASON_SECONDS = 0.5
"""Until Ray is no longer asked why a rank has ended: less than `EXPLAIN_SECONDS` of `Followers`."""
PLACE_HERE_SECONDS = 2.0
PLACE_SECONDS = 60.0
"""Until a cluster has room for all ranks: one that scales may add machines."""


class SharedMemory(NamedTuple):
    """A descriptor of another process of one machine."""

    process: int
    descriptor: int
    inode: int

    def open(self) -> int:
        """Raises `WorkerError`."""
        path = f"/proc/{self.process}/fd/{self.descriptor}"
        try:
            found = os.open(path, os.O_RDWR)
        except OSError as error:
            raise WorkerError(
                f"The memory of the engine core (pid {self.process}) cannot be opened: {error.strerror}. "
                "Its ranks on one machine must run as one user, in one container."
            ) from None
        if os.fstat(found).st_ino != self.inode:
            os.close(found)
            raise WorkerError(f"{path} is another file; run the ranks in one container.")
        return found


class RankActor:
    """A rank. Ray calls `run` once, which returns when the rank ends."""

    def where(self) -> tuple[str, str, int]:
        """The node's id and address, and this process's id."""
        import ray

        context = ray.get_runtime_context()
        return context.get_node_id(), ray.util.get_node_ip_address(), os.getpid()

    def run(
        self,
        number: int,
        core: tuple[str, int],
        key: bytes,
        memory: SharedMemory | None,
        seconds: float,
    ) -> int:
        """memory: of all ranks, if they are on one machine. Returns the exit status."""
        link = hello.connect(*core, key, facts(), number, timeout=seconds)
        exit_when_closed(
            [link.fileno()], processes=[os.getppid()]
        )  # the parent is the node's raylet
        with contextlib.closing(link):
            module, _, name = RUN.partition(":")
            shared = -1 if memory is None else memory.open()
            return int(getattr(import_module(module), name)(link, number, shared))


def facts() -> dict[str, str | int]:
    return {"version": VERSION}


@dataclass(slots=True)
class RayRank:
    """A `Rank`."""

    number: int
    name: str
    actor: Any
    running: Any
    """The reference of `run`'s result."""
    link: Link

    def reason(self) -> str:
        return _reason(self.running)

    def end(self) -> None:
        import ray

        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.kill(self.actor)
        self.link.close()


class _Placed(NamedTuple):
    """An actor, and where it is."""

    actor: Any
    node: str
    address: str
    process: int


class RayRanks:
    """`Ranks` of a cluster: of the one at RAY_ADDRESS, else of the one that runs here, else of a new one that
    ends with this process."""

    def __init__(self, config: EngineConfig, device: str) -> None:
        """Returns when all ranks have connected. Raises `ConfigError`, `WorkerError`."""
        self.ranks: list[Rank] = []
        self.group_memory = -1
        self.host: str | None = None
        self._config = config
        self._group: Any = None
        self._started = _connect(device)
        try:
            self._start(self._place(config.parallel.world_size - 1))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        import ray

        for rank in self.ranks:
            rank.end()
        self.ranks = []
        with contextlib.suppress(Exception):
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        self._group = None
        if self.group_memory >= 0:
            os.close(self.group_memory)
            self.group_memory = -1
        if self._started:
            self._started = False
            ray.shutdown()

    def _place(self, count: int) -> list[_Placed]:
        """Actors that are together as far as there is room."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cpus = self._config.runtime.cpu_threads or 1
        bundles, here = [{"CPU": cpus}] * count, ray.get_runtime_context().get_node_id()
        self._group = ray.util.placement_group(
            bundles, strategy="PACK", bundle_label_selector=[{"ray.io/node-id": here}] * count
        )
        if not self._group.wait(PLACE_HERE_SECONDS):
            ray.util.remove_placement_group(self._group)
            self._group = ray.util.placement_group(bundles, strategy="PACK")
        if not self._group.wait(PLACE_SECONDS):
            raise ConfigError(
                f"The Ray cluster has no room for {count} more ranks with {cpus} CPUs each; it has "
                f"{ray.available_resources().get('CPU', 0):g} CPUs free of "
                f"{ray.cluster_resources().get('CPU', 0):g}. Add nodes, or lower tensor_parallel_size."
            )
        make = ray.remote(max_restarts=0, max_concurrency=2, num_cpus=cpus)(RankActor)
        actors = [
            make.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=index
                )
            ).remote()
            for index in range(count)
        ]
        try:
            return [
                _Placed(actor, *place)
                for actor, place in zip(
                    actors, ray.get([each.where.remote() for each in actors]), strict=True
                )
            ]
        except ray.exceptions.RayError as error:
            raise WorkerError(f"A rank could not be started: {_last_line(error)}") from None

    def _start(self, actors: Sequence[_Placed]) -> None:
        import ray

        here, self.host = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        seconds = self._config.parallel.worker_timeout
        parallel = self._config.parallel
        sampling = parallel.world_size - parallel.tensor_parallel_size
        numbers = [number for number in range(parallel.world_size) if number != sampling]
        ordered = sorted(actors, key=lambda each: (each.node != here, each.node))
        placed = dict(zip(numbers, ordered, strict=True))
        shared = None
        if all(each.node == here for each in actors):
            self.group_memory = os.memfd_create("quire-ranks")
            shared = SharedMemory(
                os.getpid(), self.group_memory, os.fstat(self.group_memory).st_ino
            )
        key = secrets.token_bytes(32)
        with hello.listen(self.host, 0, key) as listener:
            core = (self.host, int(listener.getsockname()[1]))
            running = {
                number: each.actor.run.remote(number, core, key, shared, seconds)
                for number, each in placed.items()
            }
            try:
                links = hello.accept_all(listener, key, facts(), placed.keys(), timeout=seconds)
            except QuireError as error:
                ended, _ = ray.wait(list(running.values()), timeout=0.1)
                raise WorkerError(f"A rank {_reason(ended[0])}" if ended else str(error)) from None
        for number, each in placed.items():
            name = f"rank {number} (pid {each.process} on node {each.address})"
            link = links[number]
            link.peer = name
            self.ranks.append(RayRank(number, name, each.actor, running[number], link))


def with_threads(config: EngineConfig) -> EngineConfig:
    """Every rank has as many threads as this machine could give each, unless `cpu_threads` says it."""
    if config.runtime.cpu_threads is not None:
        return config
    ranks = config.parallel.world_size
    threads = min(max(1, len(physical_cores()) // ranks), default_threads(ranks))
    return replace(config, runtime=replace(config.runtime, cpu_threads=threads))


def _connect(device: str) -> bool:
    """Returns whether this has connected to a cluster, which it then leaves. Raises `ConfigError`."""
    if device != "cpu":
        raise ConfigError(
            "distributed_executor_backend ray places ranks on CPUs only; use mp for the GPUs of one machine."
        )
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(
            "distributed_executor_backend ray needs Ray, which is not installed; `pip install 'quire[ray]'`."
        ) from None
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment = {"PYTHONPATH": child_environment()["PYTHONPATH"]}
    try:
        ray.init(namespace="quire", runtime_env={"env_vars": environment})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"No Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')!r}: {_last_line(error)}"
        ) from None
    return True


def _reason(running: Any) -> str:
    """Why a rank's `run` has ended."""
    import ray

    ended, _ = ray.wait([running], timeout=REASON_SECONDS)
    if not ended:
        return "has ended, or its node has"
    try:
        return f"exited with status {ray.get(running)}"
    except ray.exceptions.RayActorError as error:
        found = re.search(r"The actor (?:is dead|died) because (.*?)\.(?:\s|$)", str(error))
        return f"died: {found[1] if found else _last_line(error)}"
    except ray.exceptions.RayError as error:
        return f"failed: {_last_line(error)}"


def _last_line(error: BaseException) -> str:
    """Ray's errors are pages; their last line says what it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
