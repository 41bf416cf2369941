"""Who is refused at the front door, what he is told, and that nothing is left of him."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from quire.config import from_flat
from quire.engine.admission import Admission
from quire.engine.front_end import FrontEnd
from quire.engine.input_processor import EngineRequest
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.errors import MOST_RETRY_SECONDS, ConfigError, QueueFullError
from quire.messages import CoreInput, LoadStats, SchedulerStats, StepOutputs
from quire.metrics import NullMetrics
from quire.placement import Placement
from quire.sampling_params import SamplingParams
from tests.engine.checkpoints import ServableCheckpoint

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
BUSY = LoadStats(queue_tokens=1000, prompt_rate=100.0, end_rate=0.5, free_seats=100)
"""Ten seconds of prompts."""


@pytest.fixture(scope="module")
def model(servable: Callable[[str], ServableCheckpoint]) -> ServedModel:
    config = locate(from_flat({"model": str(servable("llama").directory)}))
    return serve_model(config, resolve(config))


class Door:
    """A front end whose core reports what it is told to."""

    def __init__(self, model: ServedModel, **options: object) -> None:
        self.front = FrontEnd(model, from_flat(options).scheduler)
        self.sent: list[CoreInput] = []

    def read(self, size: int = 100, tenant: str = "", weight: float = 1.0) -> EngineRequest:
        placement = Placement(tenant=tenant, weight=weight)
        return self.front.read([1] * size, PARAMS, placement=placement)

    def submit(self, size: int = 100, tenant: str = "", weight: float = 1.0) -> None:
        request = self.read(size, tenant, weight)
        self.front.check_queue(request)
        self.sent += self.front.start(request).send

    def report(self, load: LoadStats, *, waiting: int = 0) -> None:
        self.front.take(StepOutputs(stats=SchedulerStats(num_waiting=waiting, load=load)))

    def wait(self, size: int = 100, tenant: str = "", weight: float = 1.0) -> float:
        return self.front._admission.wait(self.read(size, tenant, weight))

    def refusal(self, size: int = 100) -> QueueFullError:
        with pytest.raises(QueueFullError) as raised:
            self.submit(size)
        return raised.value


@pytest.fixture
def door(model: ServedModel) -> Iterator[Callable[..., Door]]:
    made: list[Door] = []

    def make(**options: object) -> Door:
        made.append(Door(model, **options))
        return made[-1]

    yield make
    for each in made:
        each.front.close()


def test_who_would_wait_too_long_is_refused_with_the_wait_and_nothing_is_kept_of_him(door) -> None:
    reasons = []

    class Metrics(NullMetrics):
        def on_rejected(self, reason: str) -> None:
            reasons.append(reason)

    at = door(max_ttft=9.0)
    at.front.report_to(Metrics())
    at.report(BUSY, waiting=10)
    for _ in range(50):
        error = at.refusal()
        assert "about 10.0 s" in str(error) and "--max-ttft" in str(error)
        assert 8.0 <= error.retry_after <= 12.0
    assert at.sent == [] and at.front.request_ids == [] and not at.front.is_busy
    assert reasons == ["max_ttft"] * 50
    at.report(BUSY.__class__(queue_tokens=800, prompt_rate=100.0, free_seats=100), waiting=8)
    at.submit()
    assert len(at.sent) == 1


def test_without_the_option_nobody_is_refused_and_before_a_measurement_neither(door) -> None:
    at = door()
    at.report(BUSY, waiting=10)
    at.submit()
    at = door(max_ttft=0.001)
    for _ in range(5):
        at.submit()
    assert len(at.sent) == 5


def test_what_was_sent_since_the_last_report_counts_until_the_core_has_seen_it(door) -> None:
    at = door()
    idle = LoadStats(prompt_rate=100.0, free_seats=100)
    at.report(idle)
    assert at.wait() == 0.0
    for _ in range(4):
        at.submit(200)
    queued = LoadStats(queue_tokens=800, prompt_rate=100.0, free_seats=100)
    assert at.wait() == pytest.approx(8.0)
    at.report(idle)  # of a step that had begun before they came
    assert at.wait() == pytest.approx(8.0)
    at.report(queued, waiting=4)
    assert at.wait() == pytest.approx(8.0)


def test_seats_that_have_to_become_free_count(door) -> None:
    at = door()
    at.report(LoadStats(prompt_rate=1000.0, end_rate=0.5, free_seats=0), waiting=3)
    assert at.wait() == pytest.approx(8.0)
    at.report(LoadStats(prompt_rate=1000.0, end_rate=0.5, free_seats=4), waiting=3)
    assert at.wait() == 0.0


def test_a_short_prompt_is_not_counted_to_wait_for_all_of_a_long_one(door) -> None:
    at = door()
    at.report(LoadStats(queue_tokens=32_000, prompt_rate=100.0, free_seats=9), waiting=1)
    assert at.wait(10) == pytest.approx(2 * 10 * 4 / 100)
    assert at.wait(120) < 15


def test_a_tenant_waits_for_its_own_share_only_under_the_fair_policy(door) -> None:
    waits = {}
    for policy in ("fair", "fcfs"):
        at = door(scheduling_policy=policy)
        for _ in range(8):
            at.submit(100, "flood")
        at.submit(100, "some")
        queued = LoadStats(queue_tokens=900, prompt_rate=100.0, end_rate=1.0, free_seats=0)
        for _ in range(2):
            at.report(queued, waiting=9)
        waits[policy] = [at.wait(100, tenant) for tenant in ("flood", "some", "new")]
        if policy == "fair":
            assert at.wait(100, "some", weight=4.0) == pytest.approx((1 + 1) * 5 / 4)
    assert waits["fcfs"] == [pytest.approx(10.0)] * 3
    flood, some, new = waits["fair"]
    assert flood == pytest.approx(10.0), "never more than the whole queue"
    assert some == pytest.approx((1 + 1) * 2.0), "two of its own, at half the rate"
    assert new == pytest.approx((0 + 1) * 3.0), "one, at a third of it"


def test_a_full_queue_answers_with_the_same_wait(door) -> None:
    at = door(max_num_seqs=1, max_num_queued_reqs=1)
    at.submit()
    at.submit()
    for _ in range(2):
        at.report(BUSY, waiting=1)
    error = at.refusal()
    assert str(error).startswith("The queue is full: 2 sequences run or wait")
    assert 8.0 <= error.retry_after <= 12.0
    at = door(max_num_seqs=1, max_num_queued_tokens=150)
    at.submit()
    for _ in range(2):
        at.report(BUSY, waiting=1)
    error = at.refusal()
    assert "--max-num-queued-tokens" in str(error) and 8.0 <= error.retry_after <= 12.0


@pytest.mark.parametrize(
    ("wait", "chance", "seconds"),
    [
        (10.0, 0.0, 8.0),
        (10.0, 0.5, 10.0),
        (10.0, 1.0, 12.0),
        (0.0, 0.5, 1.0),
        (1000.0, 0.0, 40.0),
        (1000.0, 1.0, MOST_RETRY_SECONDS),
    ],
)
def test_retry_after_is_jittered_and_never_above_a_minute(
    door, wait: float, chance: float, seconds: float
) -> None:
    at = door(max_num_seqs=1, max_num_queued_reqs=1)
    limits = from_flat({"max_num_seqs": 1, "max_num_queued_reqs": 1}).scheduler
    admission = Admission(limits, at.front._output, chance=lambda: chance)
    at.submit()
    at.submit()
    load = LoadStats(queue_tokens=int(100 * wait), prompt_rate=100.0, free_seats=9)
    admission.reported(SchedulerStats(load=load))
    with pytest.raises(QueueFullError) as raised:
        admission.check(at.read())
    assert raised.value.retry_after == pytest.approx(seconds)
    assert raised.value.retry_after <= MOST_RETRY_SECONDS


@pytest.mark.parametrize(
    "options",
    [
        {"itl_target": 0.0},
        {"max_ttft": -1.0},
        {"max_ttft": float("inf")},
        {"itl_target": 50.0, "enable_chunked_prefill": False, "max_num_batched_tokens": 4096},
    ],
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"itl_target|max_ttft"):
        from_flat(options)
