"""When an engine core is started again, and when that is given up: with cores that die by script."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import zmq

from quire.config import from_flat
from quire.engine import replica_cores
from quire.engine.core_client import PING_SECONDS
from quire.engine.replica_cores import LOAD_SECONDS, ReplicaCores, start_cores
from quire.errors import ConfigError
from quire.messages import (
    AddRequest,
    CoreFailed,
    CoreInput,
    CoreOutput,
    EngineReady,
    Failure,
    FinishReason,
    RequestUpdate,
    StepOutputs,
)
from tests.scheduler.requests import add_request

pytestmark = pytest.mark.skipif(not hasattr(zmq, "FD"), reason="needs descriptors")

READY = EngineReady(
    num_blocks=65, block_size=16, max_model_len=256, vocab_size=300, ledger=[], load_seconds=1.0
)
REASON = "It was killed by SIGSEGV."


class FakeProcess:
    pid = 2**22 + 7  # there is none
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL


class FakeCore:
    """A `CoreProcess` that does what the test says."""

    made: ClassVar[list[FakeCore]] = []

    def __init__(self, **options: object) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.bind("inproc://core")
        self.process = FakeProcess()
        self.says: deque[CoreOutput] = deque()
        self.got: list[CoreInput] = []
        self.config: Any = None
        self.heartbeat = 0.0
        self.silent_checks = 0
        self.is_closed = False
        self.made.append(self)

    @property
    def descriptors(self) -> list[int]:
        return [int(self.socket.getsockopt(zmq.FD))]

    def configure(self, config: Any) -> None:
        self.config = config

    def poll_ready(self) -> EngineReady:
        return READY

    def send(self, message: CoreInput) -> None:
        self.got.append(message)

    def try_receive(self) -> CoreOutput | None:
        return self.says.popleft() if self.says else None

    def exited(self) -> str | None:
        dead = self.process.returncode is not None and not self.says
        return REASON if dead else None

    def check(self) -> str | None:
        self.silent_checks += 1
        return self.exited()

    def states(self, timeout: float) -> list[str]:
        return ["ok"]

    def ask_to_end(self) -> None:
        pass

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.socket.close(0)
            self.context.term()

    def die(self, status: int = -signal.SIGSEGV) -> None:
        self.process.returncode = status


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(FakeCore, "made", [])
    monkeypatch.setattr(replica_cores, "CoreProcess", FakeCore)
    monkeypatch.setattr(replica_cores, "time", clock)
    monkeypatch.setattr(replica_cores.os, "killpg", lambda pid, number: now().process.kill())
    monkeypatch.setattr(replica_cores, "is_stopped", lambda pid: False)
    yield clock
    for core in FakeCore.made:
        core.close()


def now() -> FakeCore:
    """The core that was made last."""
    return FakeCore.made[-1]


def started(**options: object) -> ReplicaCores:
    config = from_flat({"kernels": "reference", **options})
    group = ReplicaCores(config, restarts=True)
    group.configure(config)
    assert group.wait_ready() is READY, "one is what it is, without a list of replicas"
    return group


def everything(group: ReplicaCores) -> list[CoreOutput]:
    found = []
    while (message := group.try_receive()) is not None:
        found.append(message)
    return found


def state(group: ReplicaCores) -> str:
    [found] = group.states(60.0)
    return found


def seconds_until_next(group: ReplicaCores, clock: Clock) -> float:
    """Until another core is made."""
    before, begun = now(), clock.now
    for _ in range(1000):
        everything(group)
        if now() is not before:
            return clock.now - begun
        clock.now += 0.25
    raise AssertionError("no core was made")


def live_on(group: ReplicaCores) -> None:
    now().says.append(READY)
    everything(group)
    assert state(group) == "ok"


def test_delays_grow_and_the_last_death_ends_all(clock: Clock) -> None:
    group = started(max_core_deaths=5, core_death_window=600.0)
    for delay in (0.0, 1.0, 2.0, 4.0):
        old = now()
        old.die()
        assert seconds_until_next(group, clock) == delay
        assert old.is_closed and state(group) == "restarting" and group.is_restarting
        live_on(group)
    now().die()
    last = everything(group)[-1]
    assert isinstance(last, CoreFailed)
    assert REASON in last.failure.message and "death 5 within 600 s" in last.failure.message
    assert state(group) == "stopped" and not group.is_restarting
    assert group.exited() is not None
    group.close()


def test_deaths_are_counted_in_a_window(clock: Clock) -> None:
    group = started(max_core_deaths=2, core_death_window=60.0)
    for _ in range(5):
        now().die()
        assert seconds_until_next(group, clock) == 0.0
        live_on(group)
        clock.now += 61.0
    group.close()


def test_the_longest_delay(clock: Clock) -> None:
    group = started(max_core_deaths=100, core_death_window=1e6)
    delays = []
    for _ in range(9):
        now().die()
        delays.append(seconds_until_next(group, clock))
        live_on(group)
    assert delays[-2:] == [30.0, 30.0]
    group.close()


@pytest.mark.parametrize(
    "options", [{"max_core_deaths": 1}, {"nnodes": 2, "tensor_parallel_size": 2}]
)
def test_the_first_death_ends_all_where_cores_are_not_started_again(
    clock: Clock, options: dict[str, object]
) -> None:
    group = started(**options)
    group.send(request(1))
    now().die()
    group.check()
    [last] = everything(group)
    assert isinstance(last, CoreFailed) and last.failure.message == REASON
    group.close()


def request(request_id: int) -> AddRequest:
    return add_request(request_id, [request_id] * 5, max_tokens=9)


def test_requests_go_on_in_the_next_core(clock: Clock) -> None:
    group = started()
    group.send(request(1))
    now().says.append(StepOutputs(updates=[RequestUpdate(request_id=1, new_token_ids=[4])]))
    now().says.append(StepOutputs(updates=[RequestUpdate(request_id=1, new_token_ids=[5])]))
    now().die(-signal.SIGKILL)
    messages = everything(group)
    tokens = [u.new_token_ids for m in messages if isinstance(m, StepOutputs) for u in m.updates]
    assert tokens == [[4], [5]], "what it has sent is read first"
    group.send(request(2))
    assert now().got == [], "it loads"
    live_on(group)
    again, new = now().got
    assert isinstance(again, AddRequest) and again.output_token_ids == [4, 5]
    assert new == request(2)
    assert now().config.kv_events.restarts == 1
    group.close()


def test_a_core_that_says_why_it_fails_is_dead_too(clock: Clock) -> None:
    group = started()
    group.send(request(1))
    old = now()
    old.says.append(CoreFailed(Failure("A step failed.", "EngineDeadError")))
    everything(group)
    assert old.process.returncode is not None, "it may not have ended yet"
    assert state(group) == "restarting"
    group.close()


@pytest.mark.parametrize("how", ["fails", "dies", "hangs", "is smaller"])
def test_a_core_that_cannot_be_started_again_counts(clock: Clock, how: str) -> None:
    group = started(max_core_deaths=3)
    now().die()
    for _ in range(2):
        seconds_until_next(group, clock)
        if how == "fails":
            now().says.append(CoreFailed(Failure("No memory.", "MemoryFitError")))
        elif how == "dies":
            now().die()
        elif how == "hangs":
            clock.now += LOAD_SECONDS + 30.0
        else:
            small = {f: getattr(READY, f) for f in READY.__struct_fields__} | {"max_model_len": 8}
            now().says.append(EngineReady(**small))
        found = everything(group)
    assert isinstance(found[-1], CoreFailed) and "death 3" in found[-1].failure.message
    group.close()


def test_a_request_of_which_it_dies_is_blamed_and_the_deaths_are_not_counted(clock: Clock) -> None:
    group = started(max_core_deaths=3)
    group.send(request(1))
    now().die()
    seconds_until_next(group, clock)
    live_on(group)
    now().die()
    updates = [u for m in everything(group) if isinstance(m, StepOutputs) for u in m.updates]
    assert [u.finish_reason for u in updates] == [FinishReason.ERROR]
    seconds_until_next(group, clock)
    live_on(group)
    assert group._deaths == []
    group.close()


def test_silence_is_a_death(clock: Clock) -> None:
    group = started(core_hang_timeout=5.0)
    old = now()
    for _ in range(3):
        group.check()
    assert state(group) == "ok"
    group.check()
    assert state(group) == "restarting" and old.process.returncode == -signal.SIGKILL
    assert 3 * PING_SECONDS > 5.0
    group.close()


def test_without_a_limit_silence_is_none(clock: Clock) -> None:
    group = started(core_hang_timeout=0.0)
    for _ in range(1000):
        group.check()
    assert state(group) == "ok"
    group.close()


def test_a_kill_for_lack_of_memory_is_not_from_outside(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([0, 0, 1])
    monkeypatch.setattr(replica_cores, "out_of_memory_kills", lambda: next(kills))
    group = started()
    now().die(-signal.SIGKILL)
    assert group._death(0, REASON).from_outside
    death = group._death(0, REASON)
    assert not death.from_outside and "lack of memory" in death.reason
    group.close()


def test_offline_there_is_no_restart(clock: Clock) -> None:
    assert isinstance(start_cores(from_flat({})), FakeCore)
    group = start_cores(from_flat({"data_parallel_size": 2}))
    assert isinstance(group, ReplicaCores) and not group._restarts_cores
    group.close()


@pytest.mark.parametrize(
    "options",
    [
        {"max_core_deaths": 0},
        {"core_death_window": -1.0},
        {"core_hang_timeout": float("nan")},
        {"poison_refusal_seconds": -1.0},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        from_flat(options)
