"""Requests that outlive their engine core: every state of a request, and a death then."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.core import EngineCore
from quire.engine.recovery import PROOF, Death, Recovery, fingerprint, is_restarting
from quire.engine.replicas import Messages, Replicas
from quire.errors import PoisonRequestError
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
    DropAdapter,
    EngineReady,
    FinishReason,
    KVSource,
    PromptLogprobs,
    RequestUpdate,
    ResetPrefixCache,
    Sleep,
    StepOutputs,
    WakeUp,
)
from quire.placement import Placement
from quire.sampling_params import RepetitionDetectionParams
from quire.scheduler import Scheduler, SchedulerLimits
from tests.scheduler.requests import add_request

CRASH = Death("It was killed by SIGSEGV.")
KILLED = Death("It was killed by SIGKILL.", from_outside=True)
READY = EngineReady(
    num_blocks=65, block_size=16, max_model_len=256, vocab_size=300, ledger=[], load_seconds=1.0
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def recovery(count: int, **options: Any) -> Recovery:
    """With requests 1, 2, ..., all sent."""
    found = Recovery(**options)
    for request_id in range(1, count + 1):
        found.add(request(request_id))
    assert sent(found) == list(range(1, count + 1))
    return found


def request(request_id: int, **options: Any) -> AddRequest:
    options = {"max_tokens": 20, "arrival_time": float(request_id)} | options
    return add_request(request_id, [request_id] * 5, **options)


def sent(found: Recovery) -> list[int]:
    return [message.request_id for message in found.sendable()]


def proves(found: Recovery, request_id: int) -> None:
    """It runs for as long as it takes to be no suspect."""
    for _ in range(PROOF):
        found.take(token(request_id))


def token(request_id: int, value: int = 7, **fields: Any) -> RequestUpdate:
    return RequestUpdate(request_id=request_id, new_token_ids=[value], **fields)


def test_after_a_death_from_outside_all_go_on_at_once_before_new_ones() -> None:
    found = recovery(3)
    found.take(token(2, 8))
    found.take(token(2, 9))
    verdict = found.died([1, 2, 3], KILLED)
    assert (verdict.num_resumed, verdict.ended, verdict.explains) == (3, [], 0)
    found.add(request(4))
    again = list(found.sendable())
    assert [each.request_id for each in again] == [1, 2, 3, 4]
    assert [each.output_token_ids for each in again] == [[], [8, 9], [], []]


def test_what_others_have_is_not_waited_for_again() -> None:
    """A leader that is gone, KV that was fetched, prompt logprobs that were sent."""
    found = Recovery()
    source = KVSource(engine_id="p", host="h", ports=(1,), ticket="t", num_tokens=4)
    found.add(request(1, fork_of=9, source=source, prompt_logprobs=1))
    [first] = found.sendable()
    assert first.fork_of == 9 and first.source == source
    found.take(RequestUpdate(request_id=1, prompt_logprobs=PromptLogprobs(1, [None, None])))  # type: ignore[list-item]
    found.died([1], KILLED)
    [again] = found.sendable()
    assert again.fork_of is None and again.source is None and again.num_prompt_logprobs == 3


def test_ended_and_aborted_requests_do_not_go_on() -> None:
    found = recovery(4)
    found.take(token(1, finish_reason=FinishReason.STOP))
    found.abort([2])
    assert found.died([1, 2, 3, 4], KILLED).num_resumed == 2
    found.abort([3])
    assert found.num_held == 1 and sent(found) == [4]


def test_suspects_run_one_at_a_time_and_new_requests_wait_for_them() -> None:
    found = recovery(3)
    found.died([1, 2, 3], CRASH)
    found.add(request(4))
    assert sent(found) == [1] and sent(found) == []
    for _ in range(PROOF):
        assert sent(found) == []
        found.take(token(1))
    assert sent(found) == [2]
    found.take(token(2, finish_reason=FinishReason.LENGTH))
    assert sent(found) == [3]
    found.abort([3])
    assert sent(found) == [4]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_second_death_finds_it(number: int) -> None:
    found = recovery(3)
    found.died([1, 2, 3], CRASH)
    for request_id in range(1, number):
        assert sent(found) == [request_id]
        proves(found, request_id)
    assert sent(found) == [number]
    for _ in range(PROOF - 1):
        found.take(token(number))
    verdict = found.died(range(1, number + 1), CRASH)
    [end] = verdict.ended
    assert end.request_id == number and end.finish_reason is FinishReason.ERROR
    assert end.error is not None and end.error.startswith(PoisonRequestError.BEGINNING)
    assert verdict.explains == 2
    assert sent(found) == [i for i in (1, 2, 3) if i != number], "the others are free of suspicion"


def test_what_was_blamed_is_refused_for_a_while_whatever_its_seed() -> None:
    clock = Clock()
    found = recovery(1, refusal_seconds=60.0, clock=clock)
    found.died([1], CRASH)
    assert sent(found) == [1]
    like = add_request(9, [1] * 5, max_tokens=20, seed=5)
    assert not found.refuses(like)
    found.add(add_request(8, [1] * 5, max_tokens=20, seed=6))
    verdict = found.died([1], CRASH)
    assert sorted(end.request_id for end in verdict.ended) == [1, 8], "and its like, which waits"
    assert found.refuses(like) and not found.refuses(request(2))
    found.add(like)
    [end] = found.take_ends()
    assert end.request_id == 9 and sent(found) == [] and found.take_ends() == []
    clock.now = 61.0
    assert not found.refuses(like)


def test_a_death_from_outside_during_a_trial_blames_nobody() -> None:
    found = recovery(3)
    found.died([1, 2, 3], CRASH)
    assert sent(found) == [1]
    proves(found, 1)
    assert sent(found) == [2]
    assert found.died([1, 2], KILLED).ended == []
    order = []
    for _ in range(3):
        [now] = sent(found)
        order.append(now)
        proves(found, now)
    assert order == [3, 1, 2], "the more deaths, the later"


def test_a_request_that_kills_from_inside_is_found_alone_in_two_deaths() -> None:
    """`kill(getpid(), SIGKILL)` looks like a death from outside."""
    found = recovery(1)
    assert found.died([1], KILLED).ended == []
    assert sent(found) == [1]
    assert [end.request_id for end in found.died([1], KILLED).ended] == [1]


def test_a_request_that_kills_from_inside_is_found_among_others_in_three() -> None:
    found = recovery(3)
    found.died([1, 2, 3], KILLED)
    assert sent(found) == [1, 2, 3]
    assert found.died([1, 2, 3], KILLED).ended == [], "each may be it"
    for request_id in (1, 2):
        assert sent(found) == [request_id]
        proves(found, request_id)
    assert sent(found) == [3]
    verdict = found.died([1, 2, 3], KILLED)
    assert [end.request_id for end in verdict.ended] == [3] and verdict.explains == 3


def test_two_deaths_with_progress_in_between_blame_nobody() -> None:
    found = recovery(1)
    for death in (CRASH, CRASH, KILLED, KILLED):
        assert found.died([1], death).ended == []
        assert sent(found) == [1]
        proves(found, 1)


def test_deadlines_pass_in_no_core_too() -> None:
    clock = Clock()
    found = Recovery(clock=clock)
    found.add(request(1, deadline=5.0))
    assert sent(found) == [1]
    found.take(token(1))
    found.died([1], KILLED)
    found.add(request(2, deadline=5.0))
    assert found.take_ends() == []
    clock.now = 5.0
    ends = {end.request_id: end.finish_reason for end in found.take_ends()}
    assert ends == {1: FinishReason.TIMEOUT, 2: FinishReason.EXPIRED}
    assert sent(found) == []


def test_the_fingerprint_is_of_what_is_computed() -> None:
    base = add_request(1, [1, 2], max_tokens=5)
    assert fingerprint(base) == fingerprint(add_request(2, [1, 2], max_tokens=5, seed=3))
    others = [
        add_request(1, [1, 3], max_tokens=5),
        add_request(1, [1, 2], max_tokens=6),
        add_request(1, [1, 2], max_tokens=5, stop_token_ids=frozenset({4})),
        add_request(1, [1, 2], max_tokens=5, placement=Placement(adapter="a@1")),
    ]
    assert len({fingerprint(each) for each in (base, *others)}) == 5


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["restarting"], True),
        (["restarting", "stopped"], True),
        (["restarting", "ok"], False),
        (["stopped"], False),
        ([], False),
    ],
)
def test_whether_no_core_serves_but_one_will(states: list[str], expected: bool) -> None:
    assert is_restarting(states) is expected


# --- adapters and calls ---------------------------------------------------------------------------


def group(count: int = 1) -> Replicas:
    return Replicas([READY] * count, recovery=Recovery())


def test_a_core_that_is_back_knows_what_the_others_know() -> None:
    found = group()
    a, b = AddAdapter("a@1", "/a"), AddAdapter("b@1", "/b")
    mine = request(1, placement=Placement(adapter="b@1"))
    for message in (a, b, mine, DropAdapter("b@1")):
        found.route(message)
    found.died(0, KILLED)
    assert found.route(request(2)) == [], "it waits"
    messages = [message for _, message in found.back(0, READY)]
    assert messages[0] == a
    names = [type(message).__name__ for message in messages[1:]]
    assert names == ["AddAdapter", "AddRequest", "DropAdapter", "AddRequest"]
    assert messages[1] == b and messages[3] == DropAdapter("b@1")


def test_calls_are_answered_by_the_core_that_is_back() -> None:
    found = group()
    found.route(Control(1, ResetPrefixCache()))
    found.died(0, KILLED)
    found.route(Control(2, Sleep(1)))
    assert found.back(0, READY) == [(0, Control(1, ResetPrefixCache())), (0, Control(2, Sleep(1)))]
    assert found.take(0, Answer(1, 0)) == Answer(1, 0)
    assert found.take(0, Answer(2, 1)) == Answer(2, 1)
    found.died(0, KILLED)
    [(_, sleep)] = found.back(0, READY)
    assert isinstance(sleep, Control) and sleep.action == Sleep(1), "it slept, and sleeps again"
    assert found.take(0, Answer(sleep.id, 1)) is None


def test_one_that_does_not_come_back_ends_all() -> None:
    found = group()
    found.died(0, KILLED)
    last = found.lose(0, "It was the third time.")
    assert isinstance(last, CoreFailed) and last.failure.message == "It was the third time."


def test_the_other_replica_takes_the_requests_and_the_lost_one_its_share_again() -> None:
    found = group(2)
    for i in range(1, 5):
        found.route(request(i))
    lost = [i for i, owner in found.owners.items() if owner == 0]
    assert found.died(0, KILLED).num_resumed == len(lost) == 2
    assert [(r, m.request_id) for r, m in found.release()] == [(1, i) for i in lost]  # type: ignore[union-attr]
    assert found.back(0, READY) == []
    assert {replica for i in range(5, 9) for replica, _ in found.route(request(i))} == {0}


# --- every state of a request, and a death then ---------------------------------------------------


def make_core() -> EngineCore:
    limits = SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=256)
    scheduler = Scheduler(limits, KVCacheManager(64, 16, enable_prefix_caching=True))
    return EngineCore(scheduler, MockExecutor(script))


def script(request_id: int, index: int) -> int:
    return 3 + (31 * request_id + index) % 90


class Site:
    """Cores without a model that die at any time, also of a request when it is computed."""

    def __init__(self, count: int, poison: int = 0, after: int = 1) -> None:
        """after: the number of steps in a core with which a request kills it."""
        self.poison, self.after, self.num_steps = poison, after, 0
        self.group = group(count)
        self.cores: list[EngineCore] = [make_core() for _ in range(count)]
        self.inbox: list[deque[CoreInput]] = [deque() for _ in range(count)]
        self.outbox: list[deque[CoreOutput]] = [deque() for _ in range(count)]
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason] = {}
        self.sizes: dict[int, tuple[int, int]] = {}
        self.deaths: Counter[int] = Counter()
        self.calls: dict[int, int] = {}
        self.killed: Counter[int] = Counter()
        """Deaths from outside, by the requests that were inside."""
        self.killed_alone: Counter[int] = Counter()

    def send(self, messages: Messages) -> None:
        for replica, message in messages:
            self.inbox[replica].append(message)

    def submit(self, prompt: int, max_tokens: int) -> None:
        request_id = len(self.tokens) + 1
        self.tokens[request_id], self.sizes[request_id] = [], (prompt, max_tokens)
        tokens = [request_id] * prompt
        self.send(self.group.route(add_request(request_id, tokens, max_tokens=max_tokens)))

    def abort(self, number: int) -> None:
        live = [i for i in self.tokens if i not in self.ends]
        if live:
            victim = live[number % len(live)]
            self.ends[victim] = FinishReason.ABORT
            self.send(self.group.route(AbortRequests([victim])))

    def reset(self) -> None:
        call = len(self.calls) + 1
        self.calls[call] = 0
        self.send(self.group.route(Control(call, ResetPrefixCache())))

    def work(self, replica: int) -> None:
        if replica not in self.group.alive:
            return
        core = self.cores[replica]
        while self.inbox[replica]:
            answer = core.handle(self.inbox[replica].popleft())
            if answer is not None:
                self.outbox[replica].append(answer)
        if not core.has_work:
            return
        output = core.step()
        plan = core.executor.plans[-1]  # type: ignore[attr-defined]
        self.num_steps += self.poison in {row.request_id for row in plan.rows}
        if self.num_steps == self.after:
            self.num_steps = 0
            self.deaths[self.poison] += 1
            self.die(replica, CRASH)
        else:
            self.outbox[replica].append(output)

    def deliver(self, replica: int) -> None:
        if self.outbox[replica]:
            self.take(self.group.take(replica, self.outbox[replica].popleft()))
            self.send(self.group.release())

    def take(self, message: CoreOutput | None) -> None:
        if isinstance(message, Answer):
            self.calls[message.id] += 1
        if isinstance(message, StepOutputs):
            for answer in message.answers:
                self.calls[answer.id] += 1
            for update in message.updates:
                if update.request_id in self.ends:
                    continue
                self.tokens[update.request_id] += update.new_token_ids
                if update.finish_reason is not None:
                    self.ends[update.request_id] = update.finish_reason

    def die(self, replica: int, death: Death = KILLED) -> None:
        """What it has sent may arrive first, or is lost."""
        if replica in self.group.alive:
            for message in list(self.outbox[replica]):
                self.take(self.group.take(replica, message))
            self.inbox[replica].clear()
            self.outbox[replica].clear()
            owners = self.group.owners.items()
            inside = [i for i, owner in owners if owner == replica and i not in self.ends]
            if death is KILLED:
                self.killed.update(inside)
                self.killed_alone.update(inside if len(inside) == 1 else ())
            self.take(StepOutputs(updates=self.group.died(replica, death).ended))
            self.send(self.group.release())

    def lose(self, replica: int) -> None:
        """It dies, and nothing of what it has sent arrives."""
        self.outbox[replica].clear()
        self.die(replica)

    def back(self, replica: int) -> None:
        if replica in self.group.returning:
            self.cores[replica] = make_core()
            self.send(self.group.back(replica, READY))

    def finish(self) -> None:
        for _ in range(4000):
            if len(self.ends) == len(self.tokens) and all(self.calls.values()):
                return
            for replica in range(len(self.cores)):
                self.back(replica)
                self.work(replica)
                self.deliver(replica)
        raise AssertionError(f"no end: {self.ends} of {self.sizes}")


REPLICA = st.integers(0, 1)
EVENTS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 40), st.integers(1, 6)),
    st.tuples(st.just("submit"), st.integers(1, 40), st.integers(1, 6)),
    *[st.tuples(st.just("work"), REPLICA)] * 3,
    *[st.tuples(st.just("deliver"), REPLICA)] * 3,
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("die"), REPLICA),
    st.tuples(st.just("lose"), REPLICA),
    st.tuples(st.just("back"), REPLICA),
)


@given(st.lists(EVENTS, max_size=60), st.sampled_from([1, 2]))
@settings(max_examples=200, deadline=None)
def test_every_request_ends_once_with_the_tokens_of_an_undisturbed_core(
    events: list[Any], count: int
) -> None:
    site = Site(count)
    for kind, *values in events:
        if kind in ("work", "deliver", "die", "lose", "back"):
            values = [values[0] % count]
        getattr(site, kind)(*values)
    site.finish()
    for request_id, (prompt, max_tokens) in site.sizes.items():
        expected = [script(request_id, prompt + i) for i in range(max_tokens)]
        found = site.tokens[request_id]
        if site.ends[request_id] is FinishReason.LENGTH:
            assert found == expected
        else:
            assert found == expected[: len(found)]
            if site.ends[request_id] is not FinishReason.ABORT:  # it is blamed, with good reason
                assert site.killed_alone[request_id] > 1 or site.killed[request_id] > 2
    assert set(site.calls.values()) <= {1}
    assert site.group.owners.keys() <= {i for i, e in site.ends.items() if e is FinishReason.ABORT}


@given(st.integers(1, 9), st.integers(1, PROOF), st.data(), st.sampled_from([1, 2]))
@settings(max_examples=150, deadline=None)
def test_poison_is_found_in_two_deaths_and_nobody_else_suffers(
    number: int, after: int, data: st.DataObject, count: int
) -> None:
    culprit = data.draw(st.integers(1, number))
    site = Site(count, culprit, after)
    for _ in range(number):
        site.submit(data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6)))
        if data.draw(st.booleans()):
            site.work(0)
            site.deliver(0)
            site.back(0)
    site.finish()
    end = site.ends.pop(culprit)
    if end is FinishReason.ERROR:
        assert site.deaths == {culprit: 2}
    else:  # what was left of it took fewer steps
        assert end is FinishReason.LENGTH and site.deaths[culprit] < 2 and after > 1
    assert set(site.ends.values()) <= {FinishReason.LENGTH}


# --- what the new core makes of it ----------------------------------------------------------------


@pytest.mark.parametrize(
    "decoding",
    [
        {"max_tokens": 12},
        {"max_tokens": 12, "stop_token_ids": frozenset({script(1, 13)}), "min_tokens": 9},
        {"max_tokens": 12, "end_token_ids": frozenset({script(1, 15)})},
        {
            "max_tokens": 12,
            "repetition_detection": RepetitionDetectionParams(
                max_pattern_size=1, min_pattern_size=1, min_count=3
            ),
        },
    ],
)
@pytest.mark.parametrize("before", range(1, 12))
def test_a_core_counts_the_output_of_another_as_its_own(
    decoding: dict[str, Any], before: int
) -> None:
    def run(core: EngineCore, message: AddRequest) -> list[RequestUpdate]:
        core.handle(message)
        updates = []
        while core.has_work:
            updates += core.step().updates
        return updates

    def flat(request_id: int, index: int) -> int:
        return 5 if "repetition_detection" in decoding and index > 12 else script(1, index)

    def core() -> EngineCore:
        made = make_core()
        made.executor.script = flat  # type: ignore[attr-defined]
        return made

    message = add_request(1, [1] * 5, **decoding)
    whole = run(core(), message)
    tokens = [token for update in whole for token in update.new_token_ids]
    if before >= len(tokens):
        return
    found = Recovery()
    found.add(message)
    assert sent(found) == [1]
    for update in whole[:before]:
        found.take(update)
    found.died([1], KILLED)
    [again] = found.sendable()
    rest = run(core(), again)
    assert [token for update in rest for token in update.new_token_ids] == tokens[before:]
    assert rest[-1].finish_reason is whole[-1].finish_reason
    assert rest[-1].stop_token == whole[-1].stop_token
    assert all(update.prefix is None for update in rest), "the prompt was counted before"


def test_a_deadline_that_has_passed_meanwhile_is_not_that_of_a_request_that_has_waited() -> None:
    core = make_core()
    core.handle(AddRequest(**_with_output(request(1, deadline=1.0))))
    [end] = core.step().updates
    assert end.finish_reason is FinishReason.TIMEOUT


def test_a_request_without_a_token_left_is_refused() -> None:
    core = make_core()
    answer = core.handle(AddRequest(**_with_output(request(1, max_tokens=1))))
    assert isinstance(answer, StepOutputs)
    assert answer.updates[0].finish_reason is FinishReason.ERROR


def _with_output(message: AddRequest) -> dict[str, Any]:
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return fields | {"output_token_ids": [4]}


def test_the_level_of_sleep_is_kept_until_a_wake_up() -> None:
    found = group()
    found.route(Control(1, Sleep(2)))
    found.take(0, Answer(1, 2))
    found.route(Control(2, WakeUp()))
    found.take(0, Answer(2, 0))
    found.died(0, KILLED)
    assert found.back(0, READY) == []
