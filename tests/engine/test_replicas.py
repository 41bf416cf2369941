"""Several cores as one: who gets what, what their answers mean, and replicas that stop at any time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.config import from_flat
from quire.engine.core import EngineCore
from quire.engine.front_end import Effects, FrontEnd
from quire.engine.recovery import Death, Recovery
from quire.engine.replicas import Replicas, merged_ready, merged_stats
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.errors import EngineDeadError
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import (
    AbortRequests,
    AddAdapter,
    AddRequest,
    Answer,
    Control,
    CoreFailed,
    CoreInput,
    CoreOutput,
    EngineReady,
    Failure,
    FinishReason,
    Inspect,
    Ping,
    Pong,
    RequestUpdate,
    ResetPrefixCache,
    SchedulerStats,
    Sleep,
    StepOutputs,
    WakeUp,
)
from quire.messages.state import BlockMap, CoreState
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, SamplingParams
from quire.scheduler import Scheduler, SchedulerLimits
from tests.engine.checkpoints import ServableCheckpoint
from tests.scheduler.requests import add_request

READY = EngineReady(
    num_blocks=65,
    block_size=16,
    max_model_len=256,
    vocab_size=300,
    ledger=[("machine memory", "8 GiB"), ("weights", "1 MiB"), ("KV blocks", "64")],
    weight_bytes=10,
    kv_bytes=64,
    load_seconds=1.0,
)


def replicas(count: int = 2) -> Replicas:
    return Replicas([READY] * count)


def place(group: Replicas, request: AddRequest) -> int:
    [(replica, message)] = group.route(request)
    assert message is request
    return replica


def step(*updates: RequestUpdate, **fields: Any) -> StepOutputs:
    return StepOutputs(updates=list(updates), **fields)


def ended(request_id: int) -> RequestUpdate:
    return RequestUpdate(request_id=request_id, finish_reason=FinishReason.STOP)


# --- who gets what --------------------------------------------------------------------------------


def test_requests_are_divided_and_aborts_follow_them() -> None:
    group = replicas()
    where = {i: place(group, add_request(i, [i] * 20)) for i in range(1, 7)}
    assert sorted(where.values()) == [0, 0, 0, 1, 1, 1]
    group.take(where[2], step(ended(2)))
    sent = dict(group.route(AbortRequests([1, 2, 3, 4, 99])))
    assert {
        replica: set(message.request_ids)
        for replica, message in sent.items()
        if isinstance(message, AbortRequests)
    } == {replica: {i for i in (1, 3, 4) if where[i] == replica} for replica in (0, 1)}


def test_siblings_and_groups_stay_together() -> None:
    group = replicas(3)
    for first in (10, 20, 30):
        home = place(group, add_request(first, [first] * 8))  # too short to be known again
        for sibling in range(first + 1, first + 5):
            assert place(group, add_request(sibling, [first] * 8, fork_of=first)) == home
    beams = [
        AddRequest(request_id=100 + i, prompt_token_ids=[i] * 8, decoding=READY_DECODING, group=100)
        for i in range(6)
    ]
    home = place(group, beams[0])
    group.take(home, step(ended(100)))  # between two rounds nobody is live
    assert {place(group, beam) for beam in beams[1:]} == {home}


READY_DECODING = add_request(1, [1]).decoding


def test_what_concerns_all_is_sent_to_all_that_live() -> None:
    group = replicas(3)
    group.lose(1, "gone")
    for message in (AddAdapter("a", "/a"), Ping(1), Control(1, ResetPrefixCache())):
        assert group.route(message) == [(0, message), (2, message)]


def test_a_slow_replica_is_avoided_while_there_is_another() -> None:
    group = replicas()
    assert {group.route(add_request(i, [i] * 9), slow=[0])[0][0] for i in range(1, 9)} == {1}
    assert group.route(add_request(9, [9]), slow=[0, 1])[0][0] in (0, 1)


def test_a_cache_that_was_emptied_no_longer_attracts() -> None:
    group = replicas()
    tokens = list(range(64))
    home = place(group, add_request(1, tokens))
    group.route(Control(1, ResetPrefixCache()))
    assert place(group, add_request(2, tokens)) != home


def test_salt_and_adapter_are_told_apart() -> None:
    group = replicas()
    tokens = list(range(64))
    home = place(group, add_request(1, tokens, placement=Placement(cache_salt="a")))
    other = add_request(2, tokens, placement=Placement(cache_salt="b"))
    assert place(group, other) != home
    assert place(group, add_request(3, tokens, placement=Placement(cache_salt="a"))) == home


# --- what they say --------------------------------------------------------------------------------


def test_a_call_is_answered_when_all_have_answered() -> None:
    group = replicas(3)
    group.route(Control(6, ResetPrefixCache()))
    assert not group.is_changing(2)
    group.route(Control(7, Sleep(1)))
    assert group.is_changing(2)
    assert group.take(0, Answer(7, 1)) is None
    outputs = group.take(1, step(answers=[Answer(7, 1)]))
    assert isinstance(outputs, StepOutputs) and outputs.answers == []
    assert group.take(2, Answer(7, 0, Failure("no memory", "EngineError"))) == Answer(
        7, 1, Failure("Replica 2: no memory", "EngineError")
    )
    assert not group.is_changing(2) and group.take(2, Answer(7, 0)) is None


def test_a_replica_that_stops_no_longer_keeps_a_call_waiting() -> None:
    group = replicas()
    group.route(Control(1, WakeUp()))
    group.take(0, Answer(1, 0))
    lost = group.lose(1, "it was killed")
    assert isinstance(lost, StepOutputs) and lost.answers == [Answer(1, 0)]


def core_state() -> CoreState:
    blocks = BlockMap(
        num_blocks=4, block_size=16, num_free=4, num_cached=0, num_shared=0, cells=bytes(8)
    )
    return CoreState(cost_seconds=0.0, num_running=0, num_waiting=0, requests=[], blocks=blocks)


def test_each_replica_shows_its_state() -> None:
    group = replicas(3)
    group.lose(1, "gone")
    control = Control(3, Inspect())
    assert group.route(control) == [(0, control), (2, control)]
    assert group.take(2, Answer(3, 0, states=[core_state()])) is None
    answer = group.take(0, Answer(3, 0, states=[core_state()]))
    assert isinstance(answer, Answer)
    assert [state.replica for state in answer.states] == [0, 2]


def test_an_inspection_does_not_wait_for_a_replica_that_restarts() -> None:
    group = Replicas([READY] * 3, recovery=Recovery())
    first, second, third = (Control(number, Inspect()) for number in (1, 2, 3))
    group.route(first)
    group.take(0, Answer(1, 0, states=[core_state()]))
    group.take(2, Answer(1, 0, states=[core_state()]))
    group.died(1, Death("killed"))
    [answer] = group.without(1)
    assert [state.replica for state in answer.states] == [0, 2] and answer.id == 1
    assert [replica for replica, _ in group.route(second)] == [0, 2], "the dead one is not asked"
    for replica in (0, 2):
        group.died(replica, Death("killed"))
        assert group.without(replica) == [], "nobody has answered"
    assert group.route(third) == []
    assert group.back(1, READY) == [(1, third)], "asked when nobody lived"
    answer = group.take(1, Answer(3, 0, states=[core_state()]))
    assert isinstance(answer, Answer) and [state.replica for state in answer.states] == [1]


def test_a_lost_replica_ends_its_own_requests_and_is_not_heard_again() -> None:
    group = replicas()
    where = {i: place(group, add_request(i, [i] * 20)) for i in range(1, 5)}
    message = group.take(1, CoreFailed(Failure("It broke.", "EngineDeadError")))
    assert isinstance(message, StepOutputs) and message.replica == 1
    mine = [i for i, replica in where.items() if replica == 1]
    assert [update.request_id for update in message.updates] == mine
    for update in message.updates:
        assert update.finish_reason is FinishReason.ERROR and update.error is not None
        assert (
            update.error.startswith(f"{EngineDeadError.REPLICA_LOST} 1")
            and "It broke." in update.error
        )
    assert group.take(1, step(*(ended(i) for i in mine))) is None
    assert group.lose(1, "again") is None
    assert {place(group, add_request(10 + i, [i] * 20)) for i in range(4)} == {0}
    last = group.lose(0, "It broke too.")
    assert isinstance(last, CoreFailed) and "All 2 replicas" in last.failure.message
    assert group.route(add_request(99, [1])) == []


def test_steps_say_whose_they_are() -> None:
    group = replicas()
    outputs = step(stats=SchedulerStats(num_running=1))
    assert group.take(1, outputs) is outputs and outputs.replica == 1
    assert group.take(0, Pong(1, 2.0)) == Pong(1, 2.0)


def test_what_they_have_together() -> None:
    small = EngineReady(
        **{**_fields(READY), "num_blocks": 33, "max_model_len": 128, "kv_bytes": 32}
    )
    ready = merged_ready([READY, small])
    assert (ready.num_blocks, ready.max_model_len, ready.kv_bytes) == (97, 128, 96)
    assert ready.replicas == [READY, small]
    assert [what for what, _ in ready.ledger] == ["machine memory", "replica 0:", "replica 1:"]
    stats = [
        SchedulerStats(
            num_running=2, kv_usage=0.5, waiting_by_reason={"capacity": 1}, running_adapters=["b"]
        ),
        SchedulerStats(
            num_running=1, kv_usage=0.1, waiting_by_reason={"capacity": 2, "deferred": 1}
        ),
    ]
    latest: dict[int, SchedulerStats] = {}
    assert merged_stats(latest, step(stats=stats[0])) is stats[0]
    total = merged_stats(latest, step(stats=stats[1], replica=1))
    assert (total.num_running, total.kv_usage) == (3, 0.3)
    assert total.waiting_by_reason == {"capacity": 3, "deferred": 1}
    assert merged_stats(latest, step(replica=1)) == total
    assert merged_stats({}, step()) == SchedulerStats()


def _fields(ready: EngineReady) -> dict[str, Any]:
    return {name: getattr(ready, name) for name in ready.__struct_fields__}


# --- everything at any moment ---------------------------------------------------------------------


class Cluster:
    """A front end over cores without a model, with a queue of messages in each direction."""

    def __init__(self, model: ServedModel, count: int) -> None:
        config = from_flat({"max_num_seqs": 2})
        self.front = FrontEnd(model, config.scheduler)
        self.group = replicas(count)
        self.cores = [make_core() for _ in range(count)]
        self.inbox: list[deque[CoreInput]] = [deque() for _ in range(count)]
        self.outbox: list[deque[CoreOutput]] = [deque() for _ in range(count)]
        self.outputs: dict[str, list[Any]] = {}
        self.answers: dict[int, int] = {}

    def apply(self, effects: Effects) -> None:
        for message in effects.send:
            for replica, each in self.group.route(message):
                self.inbox[replica].append(each)
        for output in effects.outputs:
            self.outputs[output.request_id].append(output)
        for answer in effects.answers:
            self.answers[answer.id] += 1

    def submit(self, params: Any, tokens: list[int]) -> None:
        if self.front.is_sleeping:
            return
        request = self.front.read(tokens, params)
        self.outputs[request.request_id] = []
        self.apply(self.front.start(request))

    def control(self, action: Any) -> None:
        control = self.front.new_control(action)
        self.answers[control.id] = 0
        self.apply(self.front.start_control(control))

    def work(self, replica: int) -> None:
        """A core handles what has come, and makes a step."""
        core = self.cores[replica]
        while self.inbox[replica]:
            answer = core.handle(self.inbox[replica].popleft())
            if answer is not None:
                self.outbox[replica].append(answer)
        if core.has_work:
            self.outbox[replica].append(core.step())

    def deliver(self, replica: int) -> None:
        if self.outbox[replica]:
            self._take(self.group.take(replica, self.outbox[replica].popleft()))

    def kill(self, replica: int) -> None:
        """Some of what it has sent may still arrive, and is ignored."""
        if len(self.group.alive) > 1:
            self._take(self.group.lose(replica, "killed"))

    def _take(self, message: CoreOutput | None) -> None:
        assert not isinstance(message, CoreFailed)
        if message is not None:
            self.apply(self.front.take(message))


def make_core() -> EngineCore:
    limits = SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=256)
    scheduler = Scheduler(limits, KVCacheManager(64, 16, enable_prefix_caching=True))
    return EngineCore(scheduler, MockExecutor(lambda request_id, index: 3 + index % 90))


@pytest.fixture(scope="module")
def model(servable: Callable[[str], ServableCheckpoint]) -> ServedModel:
    config = locate(from_flat({"model": str(servable("llama").directory)}))
    return serve_model(config, resolve(config))


REPLICA = st.integers(0, 2)
EVENTS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 3), st.integers(1, 40), st.integers(1, 4)),
    st.tuples(st.just("work"), REPLICA),
    st.tuples(st.just("work"), REPLICA),
    st.tuples(st.just("deliver"), REPLICA),
    st.tuples(st.just("deliver"), REPLICA),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("control"), st.sampled_from([ResetPrefixCache(), Sleep(1), WakeUp()])),
    st.tuples(st.just("kill"), REPLICA),
)


@given(st.lists(EVENTS, max_size=60))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_request_is_lost_or_doubled(model: ServedModel, events: list[Any]) -> None:
    cluster = Cluster(model, 3)
    try:
        for kind, *values in events:
            if kind == "submit":
                n, length, max_tokens = values
                params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True)
                cluster.submit(params, list(range(length)))
            elif kind == "abort":
                known = list(cluster.outputs)
                if known:
                    cluster.apply(cluster.front.abort([known[values[0] % len(known)]]))
            else:
                getattr(cluster, kind)(*values)
        cluster.control(WakeUp())
        for _ in range(2000):
            if not (cluster.front.is_busy or any(cluster.inbox) or any(cluster.outbox)):
                break
            for replica in range(3):
                cluster.work(replica)
                cluster.deliver(replica)
        for request_id, outputs in cluster.outputs.items():
            assert [o.finished for o in outputs].count(True) == 1, request_id
            assert outputs[-1].finished, request_id
            for sequence in outputs[-1].outputs:
                assert sequence.finish_reason in ("length", "abort", "error")
        assert set(cluster.answers.values()) <= {1}
        assert cluster.group.owners == {} and not cluster.front.is_busy
        for replica in cluster.group.alive:
            assert not cluster.cores[replica].scheduler.requests
    finally:
        cluster.front.close()


def test_a_beam_search_ends_with_the_error_of_its_replica(model: ServedModel) -> None:
    cluster = Cluster(model, 2)
    try:
        cluster.submit(BeamSearchParams(2, 3, ignore_eos=True), [1, 2, 3])
        [home] = set(cluster.group.owners.values())
        cluster.kill(home)
        [[output]] = cluster.outputs.values()
        assert output.finished and output.error.startswith(EngineDeadError.REPLICA_LOST)
    finally:
        cluster.front.close()
