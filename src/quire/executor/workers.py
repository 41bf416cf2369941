"""Several ranks: this process samples, the others follow it.

The worker in this process is rank 0 of the last stage. No result is ever encoded: the plan is, once, and the
same bytes go to every other rank, with the tokens that were sampled since the last one. So a step costs one
message to each rank, and what the sampling rank knows (grammars, penalties, drafts) stays here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from quire.config import EngineConfig
from quire.errors import QuireError
from quire.executor.adapters import PlanOrder, RankAdapters
from quire.executor.base import AdapterStore
from quire.executor.followers import Followers
from quire.executor.groups import Meeting, arrange
from quire.executor.loads import RankLoads
from quire.executor.nodes import numbers_of
from quire.executor.processes import ProcessRanks
from quire.executor.ranks import Ranks
from quire.kernels.group import Channel, Channels, Group
from quire.kvtransfer.base import Store
from quire.messages import Sleep, StepPlan, StepResult, WakeUp
from quire.messages.worker import (
    Carried,
    Loaded,
    LoadModel,
    OpenCache,
    Prepare,
    ReportTables,
    SampledTokens,
    Tables,
    WorkerInput,
)
from quire.runner.finished import FinishedStep
from quire.runner.following import digest_of, tables_of
from quire.runner.footprint import DeviceMemory, Footprint, WorkerSpec, spec_of_rank
from quire.runner.runner import RunningStep
from quire.runner.worker import Worker
from quire.sampling.sampler import GrammarSource
from quire.util.cores import default_threads, physical_cores, pinned, shares


class WorkersExecutor:
    """An `Executor`."""

    def __init__(
        self,
        config: EngineConfig,
        spec: WorkerSpec,
        grammars: GrammarSource,
        ranks: Ranks,
        *,
        pin: bool = False,
    ) -> None:
        """ranks: closed with this object. pin: whether this process may keep to its share of the cores.
        Raises `ConfigError`."""
        parallel = config.parallel
        tensor = parallel.tensor_parallel_size
        self._number = parallel.world_size - tensor
        here = range(parallel.world_size) if parallel.nnodes == 1 else numbers_of(parallel, 0)
        self._shares = dict(zip(here, shares(len(here)), strict=True))
        """Of the ranks of this machine."""
        self._threads = {
            number: min(
                sum(not core.isdisjoint(share) for core in physical_cores()),
                default_threads(len(here) * parallel.data_parallel_size),
            )
            for number, share in self._shares.items()
        }
        self._config = config
        self._spec = spec
        self._ranks = ranks
        self._sampled: list[SampledTokens] = []
        self._order = PlanOrder()
        self._loads: RankLoads | None = None
        self._stores: RankAdapters | None = None
        self._group: Group | None = None
        self._channels: Channels | None = None
        self._sleep_level = 0
        self._closed = False
        self.max_in_flight = parallel.pipeline_parallel_size
        with contextlib.ExitStack() as undo:
            undo.callback(ranks.close)
            share = self._shares[self._number]
            placed = ranks.host is not None
            if pin and not placed:
                os.sched_setaffinity(0, share)
            self._pinned_to = None if pin or placed else share
            """While it computes: the thread is the caller's."""
            own = spec_of_rank(spec, parallel, self._number)
            meeting = arrange(config, spec, ranks.group_memory, ranks.host)
            self._others = Followers(
                ranks.ranks, timeout=parallel.worker_timeout, on_failure=self._abort
            )
            undo.callback(self._others.watch.close)
            self._send_model(meeting)
            self._group = self._others.beside(lambda: meeting.join(config, spec, self._number))
            self._channels = meeting.connect(config, spec, self._number)
            self._worker = Worker(
                self._config_of(self._number),
                own,
                grammars=grammars,
                group=self._group,
                channels=self._channels,
            )
            undo.pop_all()

    @property
    def watched(self) -> int:
        return self._others.watch.failed

    def check(self) -> None:
        self._others.watch.check()

    @property
    def adapters(self) -> AdapterStore | None:
        own = self._worker.adapters
        if own is None:
            return None
        if self._stores is None or self._stores.own is not own:
            self._stores = RankAdapters(own, self._others, self._order)
        return self._stores

    @property
    def store(self) -> Store | None:
        return self._worker.store

    def load(self) -> Footprint:
        with pinned(self._pinned_to):
            found = {self._number: self._others.beside(self._worker.load)}
        for number, each in self._others.answers(Loaded).items():
            memory = DeviceMemory(each.total_memory, each.available_memory)
            found[number] = Footprint(each.weight_bytes, each.step_bytes, memory)
        return Footprint.of_ranks([found[number] for number in sorted(found)])

    def open_cache(self, num_blocks: int, max_model_len: int) -> None:
        self._call(
            OpenCache(num_blocks, max_model_len),
            lambda: self._worker.open_cache(num_blocks, max_model_len),
        )
        if self._worker.store is not None:
            watch, timeout = self._others.watch, self._config.parallel.worker_timeout
            self._loads = RankLoads(watch, self._others.ranks, timeout=timeout)

    def execute(self, plan: StepPlan) -> LaunchedStep | LaterStep | FinishedStep:
        sampled, self._sampled = self._sampled, []
        self._others.run(plan, sampled)
        self._order.sent()
        if self._loads is not None:
            self._loads.started(plan)

        def start() -> RunningStep | FinishedStep:
            running = self._worker.execute(plan)
            self._order.started()
            return running

        return LaterStep(self, start) if self.max_in_flight > 1 else self.launch(start)

    def launch(
        self, start: Callable[[], RunningStep | FinishedStep]
    ) -> LaunchedStep | FinishedStep:
        """This rank's part."""
        with pinned(self._pinned_to):
            running = self._others.beside(start)
        if isinstance(running, FinishedStep) and self._loads is None:
            return running
        return LaunchedStep(self, running)

    def prepare(self) -> bool:
        if self._spec.device == "cpu":
            return False
        self._others.send(Prepare())
        return self._others.beside(self._worker.prepare)

    def sleep(self, level: int) -> None:
        self._call(Sleep(level), lambda: self._worker.sleep(level))
        self._sleep_level = level

    def wake_up(self) -> None:
        """All wake up, or all sleep on."""
        failures = self._others.call(self._number, WakeUp(), self._worker.wake_up)
        if not failures:
            return
        awake = [rank for rank in self._others.ranks if rank.number not in failures]
        self._others.send(Sleep(self._sleep_level), awake)
        if self._number not in failures:
            self._worker.sleep(self._sleep_level)
        for rank in awake:
            self._others.watch.answer(rank, Carried, self._config.parallel.worker_timeout)
        raise next(iter(failures.values()))

    def table_digests(self, known: Mapping[int, int]) -> list[bytes]:
        """A hash of the block tables and of so many tokens of these requests, by rank, this one first."""
        self._others.send(ReportTables(dict(known)))
        runner = self._worker.runner
        assert runner is not None
        own = digest_of(tables_of(runner.seats, known))
        return [own, *(each.digest for each in self._others.answers(Tables).values())]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._flush()
        self._others.watch.close()
        self._abort("The engine was closed.")
        self._ranks.close()
        self._worker.close()
        for each in self._waits_in():
            each.close()

    def _flush(self) -> None:
        """Let all ranks write what is on its way to their disks, if they have any."""
        store, watch = self._worker.store, self._others.watch
        if store is not None and store.flush_seconds and watch.error is None:
            with contextlib.suppress(QuireError):
                self._others.send(Sleep(1))
                store.close()
                watch.wait(store.flush_seconds, watch.have_answered)

    def _send_model(self, meeting: Meeting) -> None:
        for rank in self._others.ranks:
            message = LoadModel(
                config=msgspec.json.encode(self._config_of(rank.number)),
                max_model_len=self._spec.max_model_len,
                cores=sorted(self._shares.get(rank.number, ())) if self._ranks.host is None else [],
                group=meeting.kind,
                address=meeting.address,
            )
            self._others.send(message, [rank])

    def _config_of(self, number: int) -> EngineConfig:
        """A rank's, with the threads of its share of the cores. Another machine shares out its own."""
        runtime = self._config.runtime
        if runtime.cpu_threads is not None or number not in self._threads:
            return self._config
        runtime = dataclasses.replace(runtime, cpu_threads=self._threads[number])
        return dataclasses.replace(self._config, runtime=runtime)

    def _call(self, message: WorkerInput, own: Callable[[], None]) -> None:
        for error in self._others.call(self._number, message, own).values():
            raise error

    def _abort(self, text: str) -> None:
        for each in self._waits_in():
            each.abort(text)

    def _waits_in(self) -> list[Group | Channel]:
        inlet = None if self._channels is None else self._channels.inlet
        return [each for each in (self._group, inlet) if each is not None]

    def took(self, running: RunningStep | FinishedStep, result: StepResult) -> StepResult:
        """The other ranks learn the result's tokens with the next plan."""
        if self._loads is not None:
            wait = isinstance(running, FinishedStep)
            result.transferred = self._loads.merge(result.transferred, wait=wait)
        if isinstance(running, RunningStep):
            tokens = [row.token_ids for row in result.sampled[: len(running.rows)]]
            self._sampled.append(SampledTokens(result.step_id, tokens))
        return result


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A `StepFuture`."""

    executor: WorkersExecutor
    running: RunningStep | FinishedStep

    def result(self) -> StepResult:
        result = self.executor._others.beside(self.running.result)
        return self.executor.took(self.running, result)


@dataclass(frozen=True, slots=True)
class LaterStep:
    """A `StepFuture` of a pipeline. The last stage computes when the result is wanted: until then this thread
    plans what the other stages compute meanwhile."""

    executor: WorkersExecutor
    start: Callable[[], RunningStep | FinishedStep]

    def result(self) -> StepResult:
        return self.executor.launch(self.start).result()


def start(
    config: EngineConfig,
    spec: WorkerSpec,
    grammars: GrammarSource,
    ranks: Ranks | None = None,
    *,
    pin: bool = False,
) -> WorkersExecutor:
    """ranks: those that were started before this process had its configuration."""
    if ranks is None and config.parallel.distributed_executor_backend == "ray":
        from quire.executor.ray import RayRanks, with_threads

        config = with_threads(config)
        ranks = RayRanks(config, spec.device)
    if ranks is None and config.parallel.nnodes > 1:
        from quire.executor.nodes import NodeRanks

        ranks = NodeRanks(config, spec)
    return WorkersExecutor(config, spec, grammars, ranks or ProcessRanks(config.parallel), pin=pin)
