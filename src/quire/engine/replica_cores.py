"""Engine cores in child processes, with the methods of one: the I/O around `Replicas`.

Served, a core that dies is started again (`Recovery` says what becomes of its requests): its processes
are killed, and when they have ended, a new one is started, at once after a first death, later with growing
delays. The process is watched by its descriptor, so that its end is noticed when it happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import signal
import time
from collections import deque
from collections.abc import Collection, Mapping
from enum import Enum

import zmq

from quire.config import EngineConfig
from quire.engine.core_client import PING_SECONDS, CoreProcess
from quire.engine.recovery import Death, Recovery, refusal
from quire.engine.replicas import Messages, Replicas, merged_ready
from quire.errors import ConfigError, EngineDeadError, PoisonRequestError, WorkerError
from quire.messages import (
    AddRequest,
    CoreFailed,
    CoreInput,
    CoreOutput,
    EngineReady,
    RecoveryCounts,
    SchedulerStats,
    StepOutputs,
)
from quire.util.cores import shares
from quire.util.processes import is_stopped, out_of_memory_kills, processor_ticks

logger = logging.getLogger(__name__)

SLOW_SECONDS = 10.0
"""New requests avoid a replica that has sent nothing for this long."""
PATIENCE = 10
"""How many times longer a replica may be silent that computes (a step of a large model on few cores may
take minutes), or that sleeps or wakes up."""
BUSY_TICKS = 5
"""Processor time since the last check, in hundredths of a second, by which one counts as computing."""
LONGEST_DELAY = 30.0
"""Seconds before a core is started again, at most. After the first death it is started at once, then the
delays are 1, 2, 4, ... seconds."""
LOAD_PATIENCE = 10
LOAD_SECONDS = 60.0
"""A core that is started again may take this long, beside `LOAD_PATIENCE` times what the start has taken."""


def start_cores(config: EngineConfig) -> CoreProcess | ReplicaCores:
    """The processes that the options ask for, to be used offline; not configured yet."""
    if config.parallel.data_parallel_size > 1:
        return ReplicaCores(config)
    return CoreProcess(kernels=config.runtime.kernels, parallel=config.parallel)


class Phase(Enum):
    """Of a core that is started again."""

    ENDING = "ending"
    WAITING = "waiting"
    LOADING = "loading"


@dataclasses.dataclass(slots=True)
class _Restart:
    phase: Phase
    due: float
    """When the core may be started, then when it must be ready."""
    begun: float


class ReplicaCores:
    """`CoreProcess`es, of which one may stop without the others. Each has its share of the processor cores,
    and its own GPUs."""

    def __init__(self, config: EngineConfig, *, restarts: bool = False) -> None:
        """Only the options of devices count here: the rest comes with `configure`. restarts: cores that die
        are started again, as `config.recovery` says."""
        parallel = config.parallel
        count = parallel.data_parallel_size
        # Ranks elsewhere would have to be started again there.
        is_local = parallel.nnodes == 1 and parallel.distributed_executor_backend != "ray"
        self._restarts_cores = (
            restarts
            and is_local
            and config.recovery.max_core_deaths > 1
            and hasattr(select, "epoll")
        )
        self._first_config, self._limits = config, config.recovery
        self._environments = _environments(config)
        self._cpus: list[Collection[int] | None] = [None]
        if count > 1:
            self._cpus = list(shares(count))
        self._timeout = parallel.worker_timeout + 2 * PING_SECONDS  # later than its ranks'
        self._messages: deque[CoreOutput] = deque()
        self._replicas: Replicas | None = None
        self._recovery: Recovery | None = None
        self._next = 0
        self._checked = time.monotonic()
        self._poller = zmq.Poller()
        self._watcher = select.epoll() if self._restarts_cores else None
        self._pidfds: dict[int, int] = {}
        self._cores: list[CoreProcess] = []
        self._ticks = [0] * count
        """The processor time that each had used at the last check."""
        self._coming: dict[int, _Restart] = {}
        """Those that are being started again."""
        self._num_starts = [0] * count
        self._deaths: list[tuple[float, int]] = []
        """When, and of which replica, in the window."""
        self._num_oom_kills = out_of_memory_kills()
        self._load_seconds = 0.0
        self._is_closed = False
        try:
            for index in range(count):
                self._cores.append(self._spawn(index))
        except BaseException:
            self.close()
            raise

    def _spawn(self, index: int) -> CoreProcess:
        core = CoreProcess(
            kernels=self._first_config.runtime.kernels,
            parallel=self._first_config.parallel,
            cpus=self._cpus[index],
            environment=self._environments[index],
        )
        self._poller.register(core.socket, zmq.POLLIN)
        if self._watcher is not None:
            self._watcher.register(core.descriptors[0], select.EPOLLIN)
            with contextlib.suppress(OSError, AttributeError):
                pidfd = self._pidfds[index] = os.pidfd_open(core.process.pid)
                self._watcher.register(pidfd, select.EPOLLIN)
        return core

    def _discard(self, index: int) -> None:
        """Free what a process that has ended has left."""
        core = self._cores[index]
        if self._watcher is not None:
            self._watcher.unregister(core.descriptors[0])
        self._unwatch_end(index)
        self._poller.unregister(core.socket)
        core.close()

    def _unwatch_end(self, index: int) -> None:
        """Its end has been noticed; the descriptor would stay readable."""
        pidfd = self._pidfds.pop(index, None)
        if pidfd is not None and self._watcher is not None:
            self._watcher.unregister(pidfd)
            os.close(pidfd)

    def configure(self, config: EngineConfig) -> None:
        """Load this model in all of them. Call once, with a `config` from `locate`."""
        self._config, self._limits = config, config.recovery
        self._begun = time.monotonic()
        for index in range(len(self._cores)):
            self._configure(index)

    def _configure(self, index: int) -> None:
        config = self._config
        events = dataclasses.replace(config.kv_events, rank=index, restarts=self._num_starts[index])
        transfer = config.kv_transfer
        if len(self._cores) > 1:
            transfer = transfer.of_replica(index, config.parallel.world_size)
        self._cores[index].configure(
            dataclasses.replace(config, kv_events=events, kv_transfer=transfer)
        )
        self._num_starts[index] += 1

    def wait_ready(self) -> EngineReady:
        """Block until all have loaded. Raises the error of the first that cannot."""
        ready: dict[int, EngineReady] = {}
        while len(ready) < len(self._cores):
            for index, core in enumerate(self._cores):
                if index not in ready and (message := core.poll_ready()) is not None:
                    ready[index] = message
        each = [ready[index] for index in range(len(ready))]
        self._load_seconds = time.monotonic() - self._begun
        if self._restarts_cores:
            self._recovery = Recovery(refusal_seconds=self._limits.poison_refusal_seconds)
        self._replicas = Replicas(
            each,
            caches_prefixes=self._config.cache.enable_prefix_caching,
            max_adapters=self._config.lora.capacity,
            recovery=self._recovery,
        )
        # What was decided for the first start holds for later ones, whatever memory there is then.
        self._max_model_len = min(one.max_model_len for one in each)
        return each[0] if len(each) == 1 else merged_ready(each)

    def stop_waiting(self) -> None:
        """Make `wait_ready` return, from another thread."""
        for core in self._cores:
            core.stop_waiting()

    # --- messages ---------------------------------------------------------------------------------

    @property
    def _alive(self) -> set[int]:
        return set() if self._replicas is None else self._replicas.alive

    def check_refused(self, requests: list[AddRequest]) -> None:
        """Raises `PoisonRequestError` for one that is like a request of which cores have died."""
        if self._recovery is not None and any(map(self._recovery.refuses, requests[:1])):
            raise PoisonRequestError(refusal())

    def send(self, message: CoreInput) -> None:
        assert self._replicas is not None, "wait_ready() first"
        self._find_dead()
        self._send(self._replicas.route(message, slow=self._slow()))
        self._put_ends()

    def _slow(self) -> list[int]:
        if len(self._cores) == 1:
            return []
        return [i for i in self._alive if self._silence(i) >= SLOW_SECONDS]

    def _send(self, messages: Messages) -> None:
        for index, each in messages:
            self._cores[index].send(each)

    def _release(self) -> None:
        """Send what may be sent now."""
        if self._recovery is not None and self._replicas is not None:
            self._send(self._replicas.release(slow=self._slow()))

    def _put_ends(self) -> None:
        if self._recovery is not None and (ends := self._recovery.take_ends()):
            self._messages.append(StepOutputs(updates=ends))

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
        if self._restarts_cores:
            self._find_dead()
            self._restart()
            return self._messages.popleft() if self._messages else None
        return None

    def _take(self, index: int) -> bool:
        """Whether there was a message of this replica."""
        assert self._replicas is not None
        message = self._cores[index].try_receive()
        if message is None:
            return False
        if isinstance(message, CoreFailed) and self._restarts_cores:
            self._end(index, _death_of(message))
            return True
        self._put(self._replicas.take(index, message))
        if self._recovery is not None and self._recovery.has_waiting:
            self._release()
        if index not in self._alive and self._alive:
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
            if not self._alive and not self._coming:
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
            if reason is not None:
                self._end(index, self._death(index, reason))
            elif silence > self._patience(index):
                stopped = is_stopped(core.process.pid)
                core.process.kill()
                hung = "was stopped" if stopped else "hung"
                reason = f"It has not answered for {silence:.0f} s ({hung}), and was ended."
                self._end(index, Death(reason, from_outside=stopped))
        self._put_ends()
        return None

    def _patience(self, index: int) -> float:
        """Seconds for which it may be silent. Of several, one that does not compute is given up early, as
        others take its requests."""
        assert self._replicas is not None
        most = self._limits.core_hang_timeout or float("inf")
        is_changing = self._replicas.is_changing(index)
        if is_changing:
            most *= PATIENCE
        if len(self._cores) == 1:
            return most
        before = self._ticks[index]
        now = self._ticks[index] = processor_ticks(self._cores[index].process.pid)
        computes = now - before >= BUSY_TICKS
        return min(most, self._timeout * (PATIENCE if computes or is_changing else 1))

    def exited(self) -> str | None:
        """The reason, if all have ended."""
        self._find_dead()
        return None if self._alive or self._coming else "All replicas have stopped."

    def _find_dead(self) -> None:
        for index in sorted(self._alive):
            if (reason := self._cores[index].exited()) is not None:
                self._end(index, self._death(index, reason))

    def _silence(self, index: int) -> float:
        """In seconds, counted by checks: this process too may have been stopped for a while."""
        return max(0, self._cores[index].silent_checks - 1) * PING_SECONDS

    def _death(self, index: int, reason: str) -> Death:
        """Of a process that has ended without a message. Whom the kernel ends for lack of memory has perhaps
        made it lack, by one of its requests."""
        before, self._num_oom_kills = self._num_oom_kills, out_of_memory_kills()
        killed = self._cores[index].process.returncode == -signal.SIGKILL
        if killed and self._num_oom_kills > before:
            return Death(f"{reason} The kernel has ended a process for lack of memory.")
        return Death(reason, from_outside=killed)

    def _end(self, index: int, death: Death) -> None:
        """It is dead, or must be. Take what it has sent, then see to its requests."""
        while index in self._alive and self._take(index):
            pass
        if index not in self._alive:
            return  # its last message has said so
        assert self._replicas is not None
        logger.error("%s is lost: %s", self._name(index), death.reason)
        if not self._restarts_cores:
            self._put(self._replicas.lose(index, death.reason))
            return
        verdict = self._replicas.died(index, death)
        counts = RecoveryCounts(resumed=verdict.num_resumed, poison=len(verdict.ended))
        self._messages.append(
            StepOutputs(
                updates=verdict.ended,
                stats=SchedulerStats(),
                replica=index,
                recovery=counts,
                answers=self._replicas.without(index),
            )
        )
        if verdict.ended:
            logger.error(
                "%s has died of a request, which is ended and refused for %g s",
                self._name(index),
                self._limits.poison_refusal_seconds,
            )
        self._come_back(index, death.reason, explained=verdict.explains)
        self._release()

    def _name(self, index: int) -> str:
        return "the engine core" if len(self._cores) == 1 else f"replica {index}"

    # --- replicas that come back ------------------------------------------------------------------

    def _come_back(self, index: int, reason: str, *, explained: int = 0) -> None:
        """Start it again, unless it has died too often. explained: deaths with a known cause, which is gone;
        the latest."""
        now = time.monotonic()
        limits = self._limits
        self._deaths.append((now, index))
        self._deaths = [each for each in self._deaths if now - each[0] <= limits.core_death_window]
        delay = sum(each[1] == index for each in self._deaths) - 2
        if explained:
            del self._deaths[-explained:]
        number = sum(each[1] == index for each in self._deaths)
        self._kill(index)
        if number >= limits.max_core_deaths:
            self._coming.pop(index, None)
            reason = (
                f"{reason} It was death {number} within {limits.core_death_window:g} s "
                "(--max-core-deaths)."
            )
            assert self._replicas is not None
            self._put(self._replicas.lose(index, reason))
            return
        seconds = min(LONGEST_DELAY, 2.0**delay) if delay >= 0 else 0.0
        self._coming[index] = _Restart(Phase.ENDING, now + seconds, now)
        logger.warning(
            "%s is started again in %g s; death %d of %d within %g s",
            self._name(index),
            seconds,
            number,
            limits.max_core_deaths,
            limits.core_death_window,
        )

    def _kill(self, index: int) -> None:
        """The process and all that it has started, which may be stopped or busy."""
        self._unwatch_end(index)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._cores[index].process.pid, signal.SIGKILL)

    @property
    def is_restarting(self) -> bool:
        """Whether `try_receive` is to be called often, without a message having come."""
        return bool(self._coming)

    def _restart(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        for index, restart in list(self._coming.items()):
            core = self._cores[index]
            if restart.phase is Phase.ENDING and core.process.poll() is not None:
                self._discard(index)
                restart.phase = Phase.WAITING
            if restart.phase is Phase.WAITING and now >= restart.due:
                self._cores[index] = self._spawn(index)
                self._configure(index)
                restart.phase = Phase.LOADING
                restart.due = now + LOAD_SECONDS + LOAD_PATIENCE * self._load_seconds
            elif restart.phase is Phase.LOADING:
                self._load(index, restart, now)

    def _load(self, index: int, restart: _Restart, now: float) -> None:
        core = self._cores[index]
        message = core.try_receive()
        reason = None
        if isinstance(message, EngineReady):
            if message.max_model_len >= self._max_model_len:
                self._is_back(index, message, now - restart.begun)
                return
            reason = (
                f"It has room for {message.max_model_len} tokens of context, before it had "
                f"{self._max_model_len}."
            )
        elif isinstance(message, CoreFailed):
            reason = message.failure.message
        elif (reason := core.exited()) is None and now > restart.due:
            reason = "It takes too long to load."
        if reason is not None:
            logger.error("%s cannot be started again: %s", self._name(index), reason)
            self._come_back(index, reason)

    def _is_back(self, index: int, ready: EngineReady, seconds: float) -> None:
        assert self._replicas is not None
        del self._coming[index]
        logger.warning("%s is ready again, %.1f s after its end", self._name(index), seconds)
        self._messages.append(
            StepOutputs(stats=SchedulerStats(), replica=index, recovery=RecoveryCounts(restarts=1))
        )
        self._send(self._replicas.back(index, ready))

    # --- for operators ----------------------------------------------------------------------------

    @property
    def heartbeat(self) -> float:
        """When the latest message of a replica that lives came."""
        return max((self._cores[index].heartbeat for index in self._alive), default=0.0)

    def states(self, timeout: float) -> list[str]:
        """Of each replica; see `CoreProcess.states`. "restarting": it is being started again."""
        return [
            core.states(timeout)[0]
            if index in self._alive
            else ("restarting" if index in self._coming else "stopped")
            for index, core in enumerate(self._cores)
        ]

    @property
    def descriptors(self) -> list[int]:
        """As of `CoreProcess`, or one for all that may happen, now and later."""
        if self._watcher is not None:
            return [self._watcher.fileno()]
        return [each for core in self._cores for each in core.descriptors]

    def close(self) -> None:
        """End all of them, at once. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for core in self._cores:
            core.ask_to_end()
        for core in self._cores:
            core.close()
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()
        if self._watcher is not None:
            self._watcher.close()


def _death_of(message: CoreFailed) -> Death:
    """A rank that was killed says as little as a core that was."""
    failure = message.failure
    killed = failure.kind == WorkerError.__name__ and "SIGKILL" in failure.message
    return Death(failure.message, from_outside=killed)


def _environments(config: EngineConfig) -> list[Mapping[str, str]]:
    """Which GPUs each replica sees: `tensor_parallel_size * pipeline_parallel_size` of them, in order."""
    parallel = config.parallel
    count, each = parallel.data_parallel_size, parallel.world_size // parallel.nnodes
    if count == 1:
        return [{}]
    from quire.engine.gpu import gpu_count

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
