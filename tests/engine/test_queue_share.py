"""Who may queue when the queue is full: shares of tenants, and the bound of what waits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config import from_flat
from quire.engine.front_end import FrontEnd
from quire.engine.output_processor import OutputProcessor
from quire.engine.queue_share import Held, Share
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.errors import QueueFullError
from quire.messages import AddRequest, FinishReason, RequestUpdate, StepOutputs
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.checkpoints import ServableCheckpoint

LIMIT = 60
MOST_AT_ONCE = 8

steps = st.lists(
    st.tuples(
        st.integers(0, 5),  # the tenant
        st.integers(-40, MOST_AT_ONCE),  # a request of so many; or so many end
    ),
    max_size=300,
)
weights = st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.0, 1.0, 3.0]), min_size=6, max_size=6)


def bound(limit: int, weights: list[float], most_at_once: int) -> float:
    """Of what waits, with these tenants."""
    return limit * (1 + math.log(sum(weights) / min(weights))) + most_at_once * len(weights)


@settings(max_examples=300, deadline=None)
@given(steps=steps, weights=weights)
def test_who_is_below_its_share_is_never_refused_and_what_waits_is_bounded(steps, weights) -> None:
    held, counts = Held(), [0] * len(weights)
    for tenant, more in steps:
        if more <= 0:
            gone = min(counts[tenant], -more)
            counts[tenant] -= gone
            if gone:
                held.remove(str(tenant), gone)
            continue
        refused = held.exceeded(LIMIT, more, str(tenant), weights[tenant])
        active = sum(w for w, count in zip(weights, counts, strict=True) if count)
        active += 0 if counts[tenant] else weights[tenant]
        share = LIMIT * weights[tenant] / active
        if sum(counts) + more <= LIMIT or not counts[tenant]:
            assert refused is None, "there is room, or it has nothing"
        else:
            assert (refused is None) == (counts[tenant] + more <= share + 1e-6)
        if refused is None:
            counts[tenant] += more
            held.add(str(tenant), weights[tenant], more)
        assert held.total == sum(counts) <= bound(LIMIT, weights, MOST_AT_ONCE)


@pytest.mark.parametrize("num_tenants", [1, 2, 5, 20])
def test_the_bound_is_reached_and_not_passed(num_tenants: int) -> None:
    """Tenants of equal weights come one after the other, each takes what it can get, and nothing ends."""
    held, limit = Held(), 1000
    for tenant in range(num_tenants):
        while held.exceeded(limit, 1, str(tenant), 1.0) is None:
            held.add(str(tenant), 1.0, 1)
    harmonic = sum(1 / k for k in range(1, num_tenants + 1))
    assert limit * harmonic - num_tenants <= held.total <= limit * harmonic + num_tenants


def test_a_lone_tenant_may_fill_the_queue_and_no_more() -> None:
    held = Held()
    held.add("a", 0.01, 10)
    assert held.exceeded(10, 1, "a", 0.01) == Share(10, 10, 1)
    held.remove("a", 1)
    assert held.exceeded(10, 1, "a", 0.01) is None
    assert held.exceeded(10, 2, "a", 0.01) is not None
    assert held.exceeded(10, 11, "b", 1.0) is not None, "larger than the whole queue"


def test_shares_follow_weights_and_count_who_has_something() -> None:
    held = Held()
    held.add("flood", 1.0, 90)
    assert held.exceeded(90, 1, "b", 2.0) is None
    held.add("b", 2.0, 59)
    assert held.exceeded(90, 1, "b", 2.0) is None
    held.add("b", 2.0, 1)
    assert held.exceeded(90, 1, "b", 2.0) == Share(60, 60, 2)
    assert held.exceeded(90, 1, "flood", 1.0) == Share(90, 30, 2)
    held.remove("flood", 90)
    assert held.exceeded(90, 30, "b", 2.0) is None, "alone again"


def test_places_go_to_those_below_their_shares() -> None:
    """A flood that always asks and one that asks less often: in the end each has half."""
    held, rng = Held(), random.Random(1)
    while held.exceeded(100, 1, "flood", 1.0) is None:
        held.add("flood", 1.0, 1)
    counts = {"flood": 100, "b": 0}
    for _ in range(3000):
        for tenant, tries in (("flood", 9), ("b", 2)):
            for _ in range(tries):
                if held.exceeded(100, 1, tenant, 1.0) is None:
                    held.add(tenant, 1.0, 1)
                    counts[tenant] += 1
        ended = rng.choice([name for name, count in counts.items() for _ in range(count)])
        held.remove(ended, 1)
        counts[ended] -= 1
    assert all(abs(count - 50) <= 2 for count in counts.values()), counts


# --- in the front end -------------------------------------------------------------------------------

ONE = SamplingParams(max_tokens=4, ignore_eos=True)
FEW = SamplingParams(max_tokens=4, ignore_eos=True, n=3)
BEAMS = BeamSearchParams(2, 3, ignore_eos=True)


@pytest.fixture(scope="module")
def model(servable: Callable[[str], ServableCheckpoint]) -> ServedModel:
    config = locate(from_flat({"model": str(servable("llama").directory)}))
    return serve_model(config, resolve(config))


class Server:
    def __init__(self, model: ServedModel, **options: object) -> None:
        self.front = FrontEnd(model, from_flat(options).scheduler)

    def ask(
        self, tenant: str, length: int = 3, weight: float = 1.0, params=ONE
    ) -> list[AddRequest]:
        """The sequences. Raises `QueueFullError`."""
        place = Placement(tenant=tenant, weight=weight)
        request = self.front.read([1] * length, params, placement=place)
        self.front.check_queue(request)
        sent = self.front.start(request).send
        return [message for message in sent if isinstance(message, AddRequest)]

    def flood(self, tenant: str, **options: object) -> int:
        count = 0
        try:
            while True:
                self.ask(tenant, **options)  # type: ignore[arg-type]
                count += 1
        except QueueFullError:
            return count

    def tell(self, sequence: AddRequest, *, ends: bool) -> None:
        reason = FinishReason.LENGTH if ends else None
        update = RequestUpdate(
            request_id=sequence.request_id, new_token_ids=[7], finish_reason=reason
        )
        self.front.take(StepOutputs(updates=[update], timestamp=1.0))


@pytest.fixture
def make(model: ServedModel):
    made: list[Server] = []

    def make(**options: object) -> Server:
        made.append(Server(model, **options))
        return made[-1]

    yield make
    for server in made:
        server.front.close()


def test_a_flood_fills_the_queue_for_itself_alone(make) -> None:
    server = make(max_num_seqs=4, max_num_queued_reqs=8)
    assert server.flood("flood") == 12
    assert server.flood("polite") == 6
    assert server.flood("heavy", weight=2.0) == 6
    with pytest.raises(QueueFullError, match=r"You have 12; your share is 3, as 3 tenants"):
        server.ask("flood")
    with pytest.raises(QueueFullError, match=r"24 sequences run or wait"):
        server.ask("polite")


def test_a_flood_of_long_prompts_fills_the_queue_for_itself_alone(make) -> None:
    server = make(max_num_seqs=1, max_num_queued_tokens=100)
    assert server.flood("flood", length=20) == 5
    assert server.flood("polite", length=10) == 5
    with pytest.raises(QueueFullError, match=r"You have 100; your share is 50, as 2 tenants"):
        server.ask("flood", length=1)
    server.ask("new", length=40)  # its first, although its share is 33
    with pytest.raises(QueueFullError, match="max-num-queued-tokens"):
        server.ask("other", length=101)


def held(output: OutputProcessor) -> list[dict[str, int]]:
    kinds = (output.live_sequences, output.queued_requests, output.queued_tokens)
    return [{name: part.count for name, part in kind._parts.items()} for kind in kinds]


def test_who_is_refused_holds_nothing(make) -> None:
    """Nothing is sent, kept or counted (tenants-overload.md, proof 5)."""
    server = make(max_num_seqs=1, max_num_queued_reqs=3, max_num_queued_tokens=30)
    server.ask("a", length=10)
    server.ask("a", length=10)
    output = server.front._output
    before = (dict(output.requests), dict(output._states), server.front.request_ids)
    counts = held(output)
    for length, params in ((11, ONE), (1, FEW)):
        with pytest.raises(QueueFullError):
            server.ask("a", length, params=params)
    assert before == (dict(output.requests), dict(output._states), server.front.request_ids)
    assert counts == held(output)


def test_the_first_token_ends_the_wait_of_a_prompt(make) -> None:
    server = make(max_num_seqs=1, max_num_queued_tokens=30)
    first = server.ask("a", length=20, params=FEW)
    with pytest.raises(QueueFullError):
        server.ask("a", length=20)
    server.tell(first[1], ends=False)
    server.ask("a", length=20)


def test_what_is_counted_is_what_there_is(make) -> None:
    """Whatever happens to requests: sequences that end one by one, beams, aborts, failures."""
    server, rng = make(max_num_queued_reqs=0), random.Random(3)
    front = server.front
    output = front._output
    live: list[AddRequest] = []
    for _ in range(600):
        kind = rng.random()
        if kind < 0.3 and len(live) < 40:
            live += server.ask(rng.choice("abc"), rng.randint(1, 9), params=rng.choice([ONE, FEW]))
        elif kind < 0.35:
            server.ask(rng.choice("abc"), params=BEAMS)
        elif kind < 0.8 and live:
            sequence = rng.choice(live)
            ends = rng.random() < 0.5
            server.tell(sequence, ends=ends)
            if ends:
                live.remove(sequence)
        elif kind < 0.9 and output.requests:
            front.abort([rng.choice(front.request_ids)])
        sequences: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for state, _ in output._states.values():
            tenant = state.request.placement.tenant
            sequences[tenant] = sequences.get(tenant, 0) + 1
        for state in output.requests.values():
            if not state.metrics.first_token_ts:
                tenant = state.request.placement.tenant
                tokens[tenant] = tokens.get(tenant, 0) + len(state.request.prompt_token_ids)
        for held, true in ((output.live_sequences, sequences), (output.queued_tokens, tokens)):
            assert {name: part.count for name, part in held._parts.items()} == true
            assert held.total == sum(true.values())
    front.fail("It broke.")
    assert not output.live_sequences._parts and not output.queued_tokens._parts
