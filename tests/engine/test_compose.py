"""Every parameter with every other: a request's output is the one it has alone, whatever shares its batch,
its blocks and its seat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from quire.engine.llm import LLM
from quire.messages import AbortRequests
from quire.outputs import RequestOutput
from quire.sampling_params import (
    BeamSearchParams,
    PoolingParams,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from quire.scheduler.invariants import check_invariants
from quire.structured.base import NoTokenLeftError
from tests.engine.checkpoints import VOCAB_SIZE, ServableCheckpoint, prompts
from tests.engine.test_exactness import (
    GREEDY,
    SCHEDULES,
    Recorder,
    assert_same_bits,
    make_llm,
    tokens_of,
)

Servable = Callable[[str], ServableCheckpoint]

STRUCTURED = [
    StructuredOutputsParams(choice=["positive", "negative", "neutral"]),
    StructuredOutputsParams(regex="(ab|cd){2,4}[0-9]?"),
    StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 4}, "n": {"enum": [1, 22]}},
            "required": ["name", "n"],
            "additionalProperties": False,
        },
        disable_any_whitespace=True,
    ),
    StructuredOutputsParams(grammar='start: "x" ("y" | "zz")+ "."'),
]


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    token = st.integers(0, VOCAB_SIZE - 1)
    greedy = draw(st.booleans())
    max_tokens = draw(st.integers(1, 24))
    return SamplingParams(
        n=1 if greedy else draw(st.sampled_from([1, 1, 2, 3])),
        temperature=0.0 if greedy else draw(st.sampled_from([0.3, 1.0, 2.0])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.1])),
        top_k=draw(st.sampled_from([0, 1, 7])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        seed=draw(st.integers(0, 5)),
        presence_penalty=draw(st.sampled_from([0.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        ignore_eos=draw(st.booleans()),
        stop=maybe(st.lists(st.text("aeiou t", min_size=1, max_size=2), max_size=2)),
        stop_token_ids=maybe(st.lists(token, max_size=3)),
        logprobs=maybe(st.sampled_from([0, 1, 5, -1])),
        prompt_logprobs=maybe(st.sampled_from([0, 2])),
        prompt_logprob_start=maybe(st.integers(0, 40)),
        logprob_token_ids=maybe(st.lists(token, min_size=1, max_size=3)),
        logit_bias=maybe(st.dictionaries(token, st.floats(-120, 120), max_size=3)),
        allowed_token_ids=maybe(st.lists(token, min_size=1, max_size=40)),
        bad_words=maybe(st.lists(st.text("aeiou t", min_size=1, max_size=3), max_size=3)),
        structured_outputs=maybe(st.sampled_from(STRUCTURED)),
        repetition_detection=maybe(
            st.builds(RepetitionDetectionParams, st.integers(1, 4), st.just(1), st.integers(2, 3))
        ),
        skip_reading_prefix_cache=maybe(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
    )


def generated(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    """Of requests that the gate lets in: parameters that were drawn may leave no token."""
    try:
        return llm.generate(prompts, params, use_tqdm=False)
    except NoTokenLeftError:
        reject()


def said(output: RequestOutput) -> Any:
    """All of an answer that must not depend on anything but the request."""
    parts = [dataclasses.asdict(part) | {"spec_decode_metrics": None} for part in output.outputs]
    return parts, output.prompt_logprobs, output.embedding, output.error


@pytest.fixture(scope="module", params=["llama", "mistral-window", "qwen2", "qwen3", "qwen2 int4"])
def llms(request: pytest.FixtureRequest, servable: Servable) -> Iterator[dict[str, LLM]]:
    name, _, quantization = request.param.partition(" ")
    checkpoint = servable(name)
    options = {"max_logprobs": -1, "quantization": quantization or None}
    engines = {
        "alone": make_llm(checkpoint, enable_prefix_caching=False, **options),
        **{name: make_llm(checkpoint, **how, **options) for name, how in SCHEDULES.items()},
    }
    yield engines
    for engine in engines.values():
        engine.close()


REQUESTS = st.lists(st.tuples(st.integers(0, 5), sampling_params()), min_size=1, max_size=12)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(REQUESTS, st.sampled_from(sorted(SCHEDULES)))
def test_any_mix_of_parameters_gives_each_request_its_own_answer(
    llms: dict[str, LLM], requests: list[tuple[int, SamplingParams]], schedule: str
) -> None:
    texts = prompts(6, seed=3)
    batch = [texts[index] for index, _ in requests]
    params = [one for _, one in requests]
    alone = [
        generated(llms["alone"], [prompt], [one])[0]
        for prompt, one in zip(batch, params, strict=True)
    ]
    together = llms[schedule].generate(batch, params, use_tqdm=False)
    for one, other in zip(alone, together, strict=True):
        assert said(one) == said(other)
    for engine in (llms["alone"], llms[schedule]):
        scheduler = engine._core._core.scheduler
        check_invariants(scheduler)
        assert not scheduler.requests and scheduler.kv.num_referenced == 0
        assert not engine._core._core.executor.runner.seats.prompts


def test_prompt_logprobs_are_the_models_own(servable: Servable) -> None:
    """Whatever is cached, and however the prompt is cut."""
    checkpoint = servable("qwen3")
    prompt = prompts(1, seed=9, longest=120)[0] * 2
    with torch.inference_mode():
        logits = checkpoint.reference(torch.tensor([prompt])).logits[0].float()
    expected = torch.log_softmax(logits, -1)
    found = []
    for options in ({}, {"max_num_batched_tokens": 32, "max_num_seqs": 8}):
        with make_llm(checkpoint, **options) as llm:
            for tokens in (1, 0, 3):
                params = SamplingParams(temperature=0.0, max_tokens=tokens, prompt_logprobs=3)
                found.append(llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs)
    assert all(one == found[0] for one in found)
    assert found[0][0] is None and len(found[0]) == len(prompt)
    for index, position in enumerate(found[0][1:], start=1):
        row = expected[index - 1]
        assert position[prompt[index]].logprob == pytest.approx(float(row[prompt[index]]), abs=2e-3)
        assert position[prompt[index]].rank <= VOCAB_SIZE
        top = [token for token, entry in position.items() if entry.rank <= 3]
        assert len(top) == 3 and set(position) <= {*top, prompt[index]}


def test_prompt_logprobs_from_a_start_use_the_cache_before_it(servable: Servable) -> None:
    prompt = prompts(1, seed=9, longest=120)[0] * 2
    whole = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    with make_llm(servable("llama")) as llm:
        cold = llm.generate([prompt], whole, use_tqdm=False)[0]
        late = llm.generate([prompt], whole.replace(prompt_logprob_start=50), use_tqdm=False)[0]
    assert cold.num_cached_tokens == 0 and late.num_cached_tokens == 48
    assert late.prompt_logprobs[:50] == [None] * 50
    assert late.prompt_logprobs[50:] == cold.prompt_logprobs[50:]


@pytest.mark.parametrize("quantization", ["int4", "int8", "fp8_per_channel"])
def test_a_quantized_model_in_every_schedule(quantization: str, servable: Servable) -> None:
    """Greedy tokens with the same logits bit for bit; beams, which fork and drop sequences at every step."""
    batch = prompts(32)
    beams = BeamSearchParams(4, 12, ignore_eos=True)
    expected: Any = None
    for options in ({}, *SCHEDULES.values()):
        with make_llm(servable("qwen2"), quantization=quantization, **options) as llm:
            recorder = Recorder(llm)
            if expected is None:
                tokens = [tokens_of(llm.generate(p, GREEDY, use_tqdm=False))[0] for p in batch]
                found = [llm.beam_search(prompt, beams)[0].sequences for prompt in batch[:3]]
                expected = tokens, recorder.logits, found
                continue
            tokens, logits, found = expected
            assert tokens_of(llm.generate(batch, GREEDY, use_tqdm=False)) == tokens
            together = [output.sequences for output in llm.beam_search(batch[:3], beams)]
            assert together == found
            assert_same_bits({key: recorder.logits[key] for key in logits}, logits)


def embed(llm: LLM, prompt: list[int], **fields: Any) -> tuple[list[float], int | None]:
    params = PoolingParams(**fields)
    [output] = llm.embed([prompt], pooling_params=params, use_tqdm=False)
    return output.outputs.embedding, output.num_cached_tokens


def test_vectors_are_the_models_hidden_states(servable: Servable) -> None:
    checkpoint = servable("qwen2")
    prompt = prompts(1, seed=4, longest=90)[0]
    with torch.inference_mode():
        hidden = checkpoint.reference.model(torch.tensor([prompt])).last_hidden_state[0].float()
    found = []
    for options in ({}, {"max_num_batched_tokens": 17, "max_num_seqs": 8}):
        with make_llm(checkpoint, **options) as llm:
            for _ in range(2):  # the second time from the cache, as far as that goes
                last, cached = embed(llm, prompt)
                mean, none_cached = embed(llm, prompt, pooling="mean", normalize=False)
                some, _ = embed(llm, prompt, dimensions=5)
                found.append((last, mean, some))
    assert all(one == found[0] for one in found)
    assert cached and none_cached == 0
    torch.testing.assert_close(
        torch.tensor(last), F.normalize(hidden[-1], dim=0), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(torch.tensor(mean), hidden.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        torch.tensor(some), F.normalize(hidden[-1][:5], dim=0), atol=2e-3, rtol=0
    )


def test_forced_tokens_skip_the_model_and_change_nothing(servable: Servable) -> None:
    structured = StructuredOutputsParams(regex="(alpha|beta) is a letter of the Greek alphabet!")
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=80, structured_outputs=structured)
    with make_llm(servable("llama")) as llm:
        core = llm._core._core
        steps = []
        schedule = core.scheduler.schedule

        def counted() -> Any:
            plan = schedule()
            steps.append(plan.num_tokens)
            return plan

        core.scheduler.schedule = counted
        jumped = llm.generate(["Tell me"], params, use_tqdm=False)[0].outputs[0]
        few, tokens = len(steps), sum(steps)
        steps.clear()
        llm.reset_prefix_cache()
        stepped = llm.generate(["Tell me"], params.replace(logprobs=0), use_tqdm=False)[0].outputs[
            0
        ]
    assert jumped.token_ids == stepped.token_ids and jumped.text == stepped.text
    assert jumped.text.endswith(" is a letter of the Greek alphabet!")
    assert jumped.finish_reason == "stop"
    assert tokens == sum(steps), "each token is computed once either way"
    assert few < len(steps)


def test_no_token_is_forced_past_its_asked_logprobs(servable: Servable) -> None:
    structured = StructuredOutputsParams(regex="(alpha|beta) is a letter!")
    params = SamplingParams(
        temperature=0.0, max_tokens=40, structured_outputs=structured, logprob_token_ids=[5]
    )
    with make_llm(servable("llama")) as llm:
        [output] = llm.generate([[7, 8]], params, use_tqdm=False)
    [completion] = output.outputs
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) > 5
    assert all(5 in position for position in completion.logprobs)


def test_a_request_that_waits_for_its_grammar_can_be_aborted(servable: Servable) -> None:
    params = SamplingParams(structured_outputs=STRUCTURED[2])
    with make_llm(servable("llama")) as llm:
        core = llm._core._core
        request = llm._front.read([1, 2], params)
        llm._apply(llm._front.start(request))
        assert core.has_work and not core.scheduler.requests
        llm._core.send(AbortRequests([request.sequences[0].request_id]))
        outputs = llm._receive().outputs
        assert [output.outputs[0].finish_reason for output in outputs] == ["abort"]
        assert not core.has_work


def test_repetition_ends_a_request(servable: Servable) -> None:
    rule = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=2, min_count=3)
    params = SamplingParams(max_tokens=50, allowed_token_ids=[70], repetition_detection=rule)
    with make_llm(servable("llama")) as llm:
        output = llm.generate(["a"], params, use_tqdm=False)[0].outputs[0]
    assert output.finish_reason == "repetition" and len(output.token_ids) == 6


def test_bad_words_never_appear_and_allowed_tokens_alone_do(servable: Servable) -> None:
    params = SamplingParams(temperature=2.0, seed=0, max_tokens=60, ignore_eos=True)
    with make_llm(servable("llama")) as llm:
        free = llm.generate(["The"], params, use_tqdm=False)[0].outputs[0]
        words = [free.text[i : i + 2] for i in range(0, 20, 2) if free.text[i : i + 2].isascii()]
        without = llm.generate(["The"], params.replace(bad_words=words), use_tqdm=False)[0]
        tokenizer = llm.get_tokenizer()
        for word in words:
            ids = tokenizer.encode(word, add_special_tokens=False)
            spans = zip(*(without.outputs[0].token_ids[i:] for i in range(len(ids))), strict=False)
            assert tuple(ids) not in set(spans)
        only = llm.generate(["The"], params.replace(allowed_token_ids=[66, 67]), use_tqdm=False)[0]
        assert set(only.outputs[0].token_ids) == {66, 67}
