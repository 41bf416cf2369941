"""What is said of drafts: counters under vLLM's names, each request's own counts, the log."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from quire.messages import DraftCounts, SchedulerStats, StepOutputs
from quire.metrics import StatsLogger, render
from quire.outputs import CompletionOutput, RequestOutput, RequestSpecDecodeMetrics
from quire.sampling_params import SamplingParams
from quire.scheduler import DecisionKind, DecisionLog
from quire.scheduler.decisions import Reporter
from quire.scheduler.draft_policy import DraftPolicy
from quire.server.usage import UsageMeter
from tests.engine.checkpoints import VOCAB_SIZE, ServableCheckpoint, prompts
from tests.engine.test_exactness import make_llm
from tests.speculative.scripted import Guesses, ScriptedDrafter, drafting


def test_counters_and_requests_say_the_same(servable: Callable[[str], ServableCheckpoint]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=["qqq"])
    batch = prompts(3)
    with make_llm(servable("llama")) as llm:
        off = llm.generate(batch, params, use_tqdm=False)
    assert all(output.outputs[0].spec_decode_metrics is None for output in off)
    guesses = Guesses(VOCAB_SIZE, [])
    guesses.kind = "mostly right"
    guesses.texts = [[*p, *o.outputs[0].token_ids] for p, o in zip(batch, off, strict=True)]
    drafting_engine = drafting(lambda model: ScriptedDrafter(guesses), most=3)
    with drafting_engine, make_llm(servable("llama"), disable_log_stats=False) as llm:
        llm._core._core.scheduler.drafting.policy = DraftPolicy()
        log = DecisionLog()
        llm._core._core.scheduler.drafting._report = Reporter(log)
        outputs = llm.generate(batch, params, use_tqdm=False)
        text = render(llm._metrics)[0].decode()
    found = [output.outputs[0].spec_decode_metrics for output in outputs]
    assert all(found)
    for output, one in zip(outputs, found, strict=True):
        steps = len(one.per_step_accepted)
        assert len(output.outputs[0].token_ids) == 40
        assert 40 - one.num_accepted - 1 >= steps > 5 and one.num_spec_tokens == 3
        assert sum(one.histogram) == steps and one.num_draft_tokens == sum(one.per_step_drafted)

    def value(name: str, **labels: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}_total{{")]
        lines = [x for x in lines if all(f'{k}="{v}"' in x for k, v in labels.items())]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    accepted = sum(one.num_accepted for one in found)
    assert value("spec_decode_num_drafts") == sum(len(one.per_step_drafted) for one in found)
    assert value("spec_decode_num_draft_tokens") == sum(one.num_draft_tokens for one in found)
    assert value("spec_decode_num_accepted_tokens") == accepted > 30
    per_position = [
        value("spec_decode_num_accepted_tokens_per_pos", position=str(n)) for n in range(3)
    ]
    assert sum(per_position) == accepted and per_position[0] > per_position[2] > 0
    decisions = [one for one in log if one.kind is DecisionKind.DRAFTS]
    assert sum(one.budget for one in decisions) == sum(one.num_draft_tokens for one in found)
    assert all(one.budget <= one.needed <= 3 for one in decisions)


def test_a_request_says_it_in_vllms_words() -> None:
    one = RequestSpecDecodeMetrics(3)
    assert one.to_dict()["mean_acceptance_length"] == 1.0
    for drafted, accepted in ((3, 3), (3, 0), (2, 1)):
        one.observe(drafted, accepted)
    expected = {
        "mean_acceptance_length": 1 + 4 / 3,
        "draft_acceptance_rate": 0.5,
        "acceptance_histogram": [1, 1, 0, 1],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 4,
        "num_draft_tokens": 8,
        "num_spec_tokens": 3,
    }
    assert one.to_dict() == expected
    steps = {"per_step_accepted": [3, 0, 1], "per_step_drafted": [3, 3, 2]}
    assert one.to_dict(detailed=True) == {**expected, **steps}
    parts = [CompletionOutput(0, "", [], spec_decode_metrics=one)]
    output = RequestOutput("1", None, [1], parts, True)
    for level, there in (("none", msgspec.UNSET), ("summary", expected),
                         ("detailed", {**expected, **steps})):  # fmt: skip
        meter = UsageMeter(level)
        meter.add(0, output)
        found = meter.metrics()
        assert found == (there if level == "none" else {"speculative_decoding": there})
        meter.add(0, output)
        assert meter.metrics() is msgspec.UNSET, "only of an answer with one sequence"


def test_the_log_has_the_acceptance_only_of_intervals_with_drafts() -> None:
    logger = StatsLogger()
    logger.line(0.0)
    counts = DraftCounts()
    counts.add(4, 3)
    counts.add(4, 1)
    assert counts == DraftCounts(2, 8, 4, [2, 1, 1])
    logger.on_step(StepOutputs(stats=SchedulerStats(num_running=1, drafts=counts)))
    assert (logger.line(10.0) or "").endswith("Draft acceptance rate: 50.0% of 8")
    logger.on_step(StepOutputs(stats=SchedulerStats(num_running=1)))
    assert "Draft" not in (logger.line(20.0) or "")


@pytest.mark.parametrize("observed", [True, False])
def test_a_decision_for_drafts(observed: bool) -> None:
    log = DecisionLog()
    Reporter(log if observed else None).drafts(7, proposed=4, verified=2)
    assert [(d.request_id, d.needed, d.budget) for d in log] == [(7, 4, 2)] * observed
