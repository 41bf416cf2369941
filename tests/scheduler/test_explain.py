"""Each kind of reason, on a schedule that was made for it: the facts, and the sentence."""

from __future__ import annotations

import msgspec
import pytest

from quire.messages import FinishReason
from quire.prefix_report import MissReason
from quire.scheduler import WaitReason
from quire.scheduler.explain import explain, parse_id, queue_reasons, slowest
from quire.scheduler.explanation import Explanation, duration
from quire.scheduler.history import History
from tests.scheduler.observed import Observed


def explained(engine: Observed, request_id: int) -> Explanation:
    found = explain(engine.history(), request_id)
    assert found is not None
    return found


def test_a_request_alone() -> None:
    engine = Observed()
    engine.add(5, 10, 3)
    engine.drain()
    found = explained(engine, 5)
    assert list(found.sentences) == [
        "r5 arrived at 2023-11-14 22:15:00.000 UTC with a prompt of 10 tokens, to generate at most 3.",
        "It was queued 0.0 ms.",
        "The cache held none of its 10 tokens: the next one had not been computed before.",
        "10 were computed in 1 step, in 20 ms.",
        "The first token came 20 ms after its arrival.",
        "Its tokens came 11 ms apart in the median, and none took more than 1.5 times as long.",
        "It ended at its limit of length 42 ms after its arrival, with 3 tokens.",
    ]
    assert found.first_token == pytest.approx(0.020) and found.seconds == pytest.approx(0.042)
    assert str(found).count("\n") == 6


def test_behind_whom_and_what_its_prompt_took() -> None:
    engine = Observed(budget=32)
    engine.add(17, 100)
    engine.add(18, 30)
    engine.add(19, 4)
    engine.drain()
    found = explained(engine, 19)
    budget = next(part for part in found.queue if part.because is WaitReason.BUDGET)
    assert budget.behind == (18,) and budget.holder == 17 and budget.holder_prompt == 100
    assert budget.holder_tokens == (24, 32) and budget.budget == 32
    assert "behind r17, whose prompt of 100 took up to 32 of a step's 32" in found.sentences[1]
    own = explained(engine, 18)
    assert own.queue[0].reason is WaitReason.BUDGET and not own.queue[0].behind
    assert "behind r17, whose prompt of 100 took 32 of each step's 32" in own.sentences[1]
    assert own.prefill is not None and own.prefill.others[0][0] == 17
    assert "beside prompt tokens of others: " in own.sentences[3]


def test_the_step_under_way_at_its_arrival() -> None:
    engine = Observed(budget=64)
    engine.add(1, 60, 4)
    engine.step()
    engine.add(2, 4, arrival_time=engine.now - 0.050)
    engine.drain()
    arrived = explained(engine, 2).queue[0]
    assert (arrived.reason, arrived.holder, arrived.holder_tokens) == (
        WaitReason.ARRIVED,
        1,
        (60, 60),
    )
    assert (
        "for the step under way, which computed 60 tokens of r1"
        in explained(engine, 2).sentences[1]
    )


def test_blocks_seats_and_those_behind() -> None:
    engine = Observed(num_blocks=9, budget=64, longest=32)
    engine.add(1, 20)
    engine.add(2, 16)
    engine.add(3, 1)
    engine.drain()
    assert "for 4 blocks (3 free at first)" in explained(engine, 2).sentences[1]
    assert (
        "behind r2, which waited for 4 blocks (3 free at first)"
        in explained(engine, 3).sentences[1]
    )
    assert explained(engine, 2).queue[0].reason is WaitReason.BLOCKS

    engine = Observed(seats=1, budget=64)
    for request_id in (1, 2, 3):
        engine.add(request_id, 4)
    engine.drain()
    assert "for a sequence slot" in explained(engine, 2).sentences[1]
    third = explained(engine, 3)
    assert [(part.reason, part.behind) for part in third.queue] == [
        (WaitReason.BEHIND, (2,)), (WaitReason.SEAT, ()),
    ]  # fmt: skip
    assert "behind r2, which waited for a sequence slot" in third.sentences[1]


def test_a_prompt_that_is_not_divided_and_a_prefix_that_another_computes() -> None:
    engine = Observed(budget=32, limits={"enable_chunked_prefill": False})
    engine.add(1, 20)
    engine.add(2, 13)
    engine.drain()
    assert "for a step with room for its 13 tokens" in explained(engine, 2).sentences[1]

    engine = Observed(budget=8)
    engine.add(1, 20)
    engine.add(2, 20, first=1001)
    engine.add(3, 20, first=1001, fork_of=1)
    engine.drain()
    assert "for r1 to compute the prefix that both have" in explained(engine, 2).sentences[1]
    assert "for r1 to compute the prompt that both have" in explained(engine, 3).sentences[1]
    assert explained(engine, 3).miss is MissReason.WHOLE and explained(engine, 3).cached == 19
    assert explained(engine, 3).sentences[2] == (
        "The cache held 19 of its 20 tokens: all but the last, which is always computed."
    )


def test_a_preemption_says_for_whom_and_what_is_computed_again() -> None:
    engine = Observed(num_blocks=9, budget=64, longest=32)
    engine.add(1, 15, 8)
    engine.add(2, 15, 8)
    engine.drain()
    found = explained(engine, 2)
    (stop,) = found.preemptions
    assert stop.by == 1 and stop.needed == 1 and stop.free == 0 and stop.num_computed == 16
    sentence = next(each for each in found.sentences if "preempted" in each)
    assert "because r1 needed 1 block and 0 were free; it waited" in sentence
    assert sentence.endswith(f"Then {stop.recomputed} of its 16 tokens were computed again.")
    first = [row for s in engine.steps for row in s.rows if row.request_id == 2][2]
    assert stop.recomputed == 16 - first.start and 0 < stop.recomputed < 16
    assert stop.waited == pytest.approx(sum(part.seconds for part in stop.parts))
    assert found.gaps[0].cause == "preempted"
    assert "when it was preempted" in found.sentences[-2]


def test_a_gap_beside_a_prompt_and_the_drafts() -> None:
    engine = Observed(
        budget=64, limits={"max_drafts": 4, "adaptive_drafts": False, "max_samples": 64}
    )
    engine.add(1, 4, 30)
    engine.run(3)
    engine.add(2, 50, 1)
    engine.drain()
    found = explained(engine, 1)
    assert found.gaps[0].cause == "prompts" and found.gaps[0].others == ((2, 50),)
    assert "beside prompt tokens of others: 50 of r2" in " ".join(found.sentences)
    proposed = sum(row.num_drafts for s in engine.steps for row in s.rows if row.request_id == 1)
    accepted = sum(row.num_accepted - 1 for s in engine.steps for row in s.rows if row.num_drafts)
    assert found.drafts == (proposed, accepted) and proposed and accepted
    assert f"Of {proposed} drafts, {accepted} were accepted." in found.sentences


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (FinishReason.ABORT, "It was aborted"),
        (FinishReason.EXPIRED, "Its deadline passed while it was queued"),
    ],
)
def test_one_that_ends_in_the_queue(reason: FinishReason, text: str) -> None:
    engine = Observed(seats=1)
    engine.add(1, 4, 20)
    engine.add(2, 4)
    engine.run(3)
    engine.abort(2, reason)
    engine.drain()
    found = explained(engine, 2)
    assert found.cached is None and found.prefill is None and found.finish_reason is reason
    assert " and never ran: " in found.sentences[1] and found.sentences[-1].startswith(text)
    assert found.queue_seconds == pytest.approx(found.seconds)


def test_one_that_is_queued_one_that_runs_and_one_whose_beginning_is_lost() -> None:
    engine = Observed(seats=1)
    engine.add(1, 4, 50)
    engine.add(2, 4)
    engine.run(5)
    assert explained(engine, 2).is_queued and " so far: " in explained(engine, 2).sentences[1]
    assert explained(engine, 1).sentences[-1] == "It has not ended; it has 5 tokens so far."
    history = engine.history()
    late = History(history.steps[2:], {2: history.arrivals[2]}, {}, history.epoch)
    found = explain(late, 1)
    assert found is not None and not found.is_whole and found.first_token is None
    assert found.sentences[0] == "The record does not reach back to the arrival of r1."
    assert explain(late, 3) is None and explain(History(), 1) is None


def test_the_summary_and_the_json() -> None:
    engine = Observed(seats=1)
    for request_id in (1, 2, 3):
        engine.add(request_id, 4)
    engine.drain()
    found = slowest(engine.history(), 2)
    assert [each.request_id for each in found] == [3, 2]
    (name, seconds, requests), *_ = queue_reasons(engine.history())
    assert (name, requests) == ("no sequence slot", 2)
    assert seconds == pytest.approx(sum(each.queue_seconds for each in found))
    encoded = msgspec.json.encode(found[0])
    assert msgspec.json.decode(encoded, type=Explanation) == found[0]


def test_numbers() -> None:
    assert [duration(x) for x in (0.00123, 0.0404, 1.5, 2000.0)] == [
        "1.2 ms",
        "40 ms",
        "1.50 s",
        "2,000.0 s",
    ]
    assert [parse_id(x) for x in ("r17", "17", "x", "r", "", "17a", "²", "9" * 30)] == [
        17, 17, None, None, None, None, None, None,
    ]  # fmt: skip
