"""Several engine cores in child processes, with the methods of one: the I/O around `Replicas`."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Mapping

import zmq

from quire.config import EngineConfig
from quire.engine.core_client import PING_SECONDS, CoreProcess
from quire.engine.replicas import Replicas, merged_ready
from quire.errors import ConfigError, EngineDeadError
from quire.messages import CoreInput, CoreOutput, EngineReady
from quire.util.cores import shares

logger = logging.getLogger(__name__)

SLOW_SECONDS = 10.0
"""New requests avoid a replica that has sent nothing for this long."""
PATIENCE = 10
"""How many times longer a replica may be silent that computes (a step of a large model on few cores may
take minutes), or that sleeps or wakes up."""
BUSY_TICKS = 5
"""Processor time since the last check, in hundredths of a second, by which one counts as computing."""


def start_cores(config: EngineConfig) -> CoreProcess | ReplicaCores:
    """The processes that the options ask for; not configured yet."""
    if config.parallel.data_parallel_size == 1:
        return CoreProcess(kernels=config.runtime.kernels, parallel=config.parallel)
    return ReplicaCores(config)


class ReplicaCores:
    """`CoreProcess`es, of which one may stop without the others. Each has its share of the processor cores,
    and its own GPUs."""

    def __init__(self, config: EngineConfig) -> None:
        """Only the options of devices count here: the rest comes with `configure`."""
        count = config.parallel.data_parallel_size
        environments = _environments(config)
        self._timeout = config.parallel.worker_timeout + 2 * PING_SECONDS  # later than its ranks'
        self._messages: deque[CoreOutput] = deque()
        self._replicas: Replicas | None = None
        self._next = 0
        self._checked = time.monotonic()
        self._poller = zmq.Poller()
        self._cores: list[CoreProcess] = []
        self._ticks = [0] * count
        """The processor time that each had used at the last check."""
        try:
            for cpus, environment in zip(shares(count), environments, strict=True):
                core = CoreProcess(
                    kernels=config.runtime.kernels,
                    parallel=config.parallel,
                    cpus=cpus,
                    environment=environment,
                )
                self._cores.append(core)
                self._poller.register(core.socket, zmq.POLLIN)
        except BaseException:
            self.close()
            raise

    def configure(self, config: EngineConfig) -> None:
        """Load this model in all of them. Call once, with a `config` from `locate`."""
        self._config = config
        for rank, core in enumerate(self._cores):
            events = dataclasses.replace(config.kv_events, rank=rank)
            transfer = config.kv_transfer.of_replica(rank, config.parallel.world_size)
            core.configure(dataclasses.replace(config, kv_events=events, kv_transfer=transfer))

    def wait_ready(self) -> EngineReady:
        """Block until all have loaded. Raises the error of the first that cannot."""
        ready: dict[int, EngineReady] = {}
        while len(ready) < len(self._cores):
            for index, core in enumerate(self._cores):
                if index not in ready and (message := core.poll_ready()) is not None:
                    ready[index] = message
        each = [ready[index] for index in range(len(ready))]
        self._replicas = Replicas(
            each,
            caches_prefixes=self._config.cache.enable_prefix_caching,
            max_adapters=self._config.lora.capacity,
        )
        return merged_ready(each)

    def stop_waiting(self) -> None:
        """Make `wait_ready` return, from another thread."""
        for core in self._cores:
            core.stop_waiting()

    # --- messages ---------------------------------------------------------------------------------

    @property
    def _alive(self) -> set[int]:
        return set() if self._replicas is None else self._replicas.alive

    def send(self, message: CoreInput) -> None:
        assert self._replicas is not None, "wait_ready() first"
        self._find_dead()
        slow = [i for i in self._alive if self._silence(i) >= SLOW_SECONDS]
        for index, each in self._replicas.route(message, slow=slow):
            self._cores[index].send(each)

    def try_receive(self) -> CoreOutput | None:
        """The next message, of any replica in turn; None if there is none."""
        if self._messages:
            return self._messages.popleft()
        empty = 0
        while empty < len(self._cores):
            self._next = (self._next + 1) % len(self._cores)
            if self._next not in self._alive or not self._take(self._next):
                empty += 1
            elif self._messages:
                return self._messages.popleft()
            else:
                empty = 0
        return None

    def _take(self, index: int) -> bool:
        """Whether there was a message of this replica."""
        assert self._replicas is not None
        message = self._cores[index].try_receive()
        if message is None:
            return False
        self._put(self._replicas.take(index, message))
        if index not in self._alive:
            logger.error("replica %d has failed; the others go on", index)
        return True

    def _put(self, message: CoreOutput | None) -> None:
        if message is not None:
            self._messages.append(message)

    def receive(self, *, timeout: float | None = None) -> CoreOutput | None:
        """The next output; None after `timeout` seconds. Raises `EngineDeadError` if all have stopped."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self.try_receive()) is None:
            now = time.monotonic()
            if not self._alive:
                raise EngineDeadError("All replicas have stopped.")
            if deadline is not None and now >= deadline:
                return None
            if now - self._checked >= PING_SECONDS:
                self.check()
                continue
            wait = PING_SECONDS if deadline is None else min(PING_SECONDS, deadline - now)
            self._poller.poll(int(wait * 1000) + 1)
        return message

    # --- replicas that stop -----------------------------------------------------------------------

    def check(self) -> str | None:
        """Call it every `PING_SECONDS`: finds replicas that have stopped, and ends those that do not answer.
        Returns None: messages say what follows."""
        self._checked = time.monotonic()
        for index in sorted(self._alive):
            core = self._cores[index]
            reason, silence = core.check(), self._silence(index)
            if reason is None and silence > self._timeout * self._patience(index):
                core.process.kill()
                reason = f"It has not answered for {silence:.0f} s, and was ended."
            if reason is not None:
                self._lose(index, reason)
        return None

    def _patience(self, index: int) -> int:
        assert self._replicas is not None
        before = self._ticks[index]
        now = self._ticks[index] = _processor_ticks(self._cores[index].process.pid)
        computes = now - before >= BUSY_TICKS
        return PATIENCE if computes or self._replicas.is_changing(index) else 1

    def exited(self) -> str | None:
        """The reason, if all have ended."""
        self._find_dead()
        return None if self._alive else "All replicas have stopped."

    def _find_dead(self) -> None:
        for index in sorted(self._alive):
            if (reason := self._cores[index].exited()) is not None:
                self._lose(index, reason)

    def _silence(self, index: int) -> float:
        """In seconds, counted by checks: this process too may have been stopped for a while."""
        return max(0, self._cores[index].silent_checks - 1) * PING_SECONDS

    def _lose(self, index: int, reason: str) -> None:
        """Take what it has sent, then end its other requests."""
        while index in self._alive and self._take(index):
            pass
        if index in self._alive:
            assert self._replicas is not None
            logger.error("replica %d is lost: %s", index, reason)
            self._put(self._replicas.lose(index, reason))

    # --- for operators ----------------------------------------------------------------------------

    @property
    def heartbeat(self) -> float:
        """When the latest message of a replica that lives came."""
        return max((self._cores[index].heartbeat for index in self._alive), default=0.0)

    def states(self, timeout: float) -> list[str]:
        """Of each replica; see `CoreProcess.states`."""
        return [
            core.states(timeout)[0] if index in self._alive else "stopped"
            for index, core in enumerate(self._cores)
        ]

    @property
    def descriptors(self) -> list[int]:
        return [each for core in self._cores for each in core.descriptors]

    def close(self) -> None:
        """End all of them, at once. Idempotent."""
        for core in self._cores:
            core.ask_to_end()
        for core in self._cores:
            core.close()


def _processor_ticks(pid: int) -> int:
    """The processor time that a process has used; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])  # utime, stime: see proc(5)


def _environments(config: EngineConfig) -> list[Mapping[str, str]]:
    """Which GPUs each replica sees: `tensor_parallel_size * pipeline_parallel_size` of them, in order."""
    from quire.engine.gpu import gpu_count  # it is not needed to start a single core

    parallel = config.parallel
    count, each = parallel.data_parallel_size, parallel.world_size // parallel.nnodes
    found = 0 if config.runtime.device == "cpu" else gpu_count()
    if not found:
        return [{} for _ in range(count)]
    if found < count * each:
        raise ConfigError(
            f"data_parallel_size {count} with {each} device(s) a replica needs {count * each} GPUs, but "
            f"{found} are visible here. Lower it, or use --device cpu."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(found)]
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[index * each : (index + 1) * each])}
        for index in range(count)
    ]
