"""Speculation changes how many steps a request takes, and nothing that anybody sees: every parameter, every
kind of guess, every schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.engine.llm import LLM
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams
from quire.scheduler.draft_policy import DraftPolicy
from quire.scheduler.invariants import check_invariants
from quire.structured.base import NoTokenLeftError
from quire.text.parsing.base import ThinkingTokens
from tests.engine.checkpoints import VOCAB_SIZE, ServableCheckpoint, prompts
from tests.engine.test_compose import generated, said, sampling_params
from tests.engine.test_exactness import SCHEDULES, make_llm
from tests.speculative.scripted import Guesses, ScriptedDrafter, drafting

THINKING = ThinkingTokens(start=[70], end=[60, 61], inside=True)
EOS = 2
MOST = 4


class Pair:
    """The same model without and, by schedule, with speculation."""

    def __init__(self, checkpoint: ServableCheckpoint, **options: Any) -> None:
        self.guesses = Guesses(VOCAB_SIZE, [EOS])
        self.drafters: list[ScriptedDrafter] = []
        self.off = thinking(make_llm(checkpoint, enable_prefix_caching=False, **options))
        with drafting(self.drafter, MOST):
            self.on = {
                name: thinking(make_llm(checkpoint, **{**how, **options}))
                for name, how in SCHEDULES.items()
            }
        for name, engine in self.on.items():
            if name != "budget 2048":  # this one adapts
                engine._core._core.scheduler.drafting.policy = DraftPolicy()

    def drafter(self, model: object) -> ScriptedDrafter:
        self.drafters.append(ScriptedDrafter(self.guesses))
        return self.drafters[-1]

    def close(self) -> None:
        for engine in (self.off, *self.on.values()):
            engine.close()


def thinking(llm: LLM) -> LLM:
    """Requests with a budget for thoughts are in the middle of them."""
    read = llm._front.read

    def asked(prompt: Any, params: Any, **options: Any) -> Any:
        thinks = getattr(params, "thinking_token_budget", None) is not None
        return read(prompt, params, thinking=THINKING if thinks else None, **options)

    llm._front.read = asked  # type: ignore[method-assign]
    return llm


@pytest.fixture(
    scope="module",
    params=[("llama", "raw_logprobs"), ("gemma2", "processed_logprobs"),
            ("qwen3-windows-bias", "raw_logits"), ("phi3", "processed_logits")],
    ids=lambda param: param[0],
)  # fmt: skip
def pair(
    request: pytest.FixtureRequest, servable: Callable[[str], ServableCheckpoint]
) -> Iterator[Pair]:
    name, mode = request.param
    pair = Pair(servable(name), max_logprobs=-1, logprobs_mode=mode)
    yield pair
    pair.close()


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    found = draw(sampling_params())
    if draw(st.booleans()):
        return found
    return found.replace(thinking_token_budget=draw(st.integers(0, 6)))


REQUESTS = st.lists(st.tuples(st.integers(0, 5), params()), min_size=1, max_size=10)


def texts(prompts: list[list[int]], outputs: list[RequestOutput]) -> list[list[int]]:
    pairs = zip(prompts, outputs, strict=True)
    return [[*prompt, *part.token_ids] for prompt, out in pairs for part in out.outputs]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(REQUESTS, st.sampled_from(sorted(SCHEDULES)), st.sampled_from(Guesses.KINDS))
def test_every_parameter_with_every_guess(
    pair: Pair, requests: list[tuple[int, SamplingParams]], schedule: str, kind: str
) -> None:
    known = prompts(6, seed=3)
    batch = [known[index] for index, _ in requests]
    wanted = [one for _, one in requests]
    pair.guesses.kind, pair.guesses.texts = "wrong", []
    off = generated(pair.off, batch, wanted)
    pair.guesses.kind, pair.guesses.texts = kind, texts(batch, off)
    on = pair.on[schedule].generate(batch, wanted, use_tqdm=False)
    for one, other in zip(off, on, strict=True):
        assert said(one) == said(other)
    scheduler = pair.on[schedule]._core._core.scheduler
    check_invariants(scheduler)
    assert not scheduler.requests and scheduler.kv.num_referenced == 0


def test_constraints_that_leave_no_token_end_a_request(pair: Pair) -> None:
    """The reasoning has to end, with a token that may not come so early. Not with a banned token, whose
    logprob is no number."""
    wanted = SamplingParams(
        temperature=0.0, max_tokens=9, min_tokens=9, thinking_token_budget=2, stop_token_ids=[61], logprobs=1
    )  # fmt: skip
    batch = prompts(1, seed=3)
    [off] = pair.off.generate(batch, wanted, use_tqdm=False)
    pair.guesses.kind, pair.guesses.texts = "right", texts(batch, [off])
    [on] = pair.on["budget 2048"].generate(batch, wanted, use_tqdm=False)
    assert said(on) == said(off)
    assert off.outputs[0].finish_reason == "error" and len(off.outputs[0].token_ids) == 3
    assert off.error == str(NoTokenLeftError(["thinking_token_budget", "min_tokens"]))


def test_something_was_drafted(pair: Pair) -> None:
    assert sum(drafter.asked for drafter in pair.drafters) > 100
