"""Beam search: against a search written in ten lines of PyTorch, against transformers', and by itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.engine.beam_search import BeamSearch, BeamSearchSequence
from quire.engine.llm import LLM
from quire.errors import InvalidParameterError, PromptTooLongError
from quire.messages import StepOutputs
from quire.outputs import Logprob
from quire.sampling_params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from quire.scheduler.invariants import check_invariants
from tests.engine.checkpoints import ServableCheckpoint

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "num_gpu_blocks_override": 200,
}
PROMPTS = [[5, 6, 7, 8], [40] * 23]


@pytest.fixture(scope="module")
def checkpoint(servable: Callable[[str], ServableCheckpoint]) -> ServableCheckpoint:
    return servable("llama")


@pytest.fixture(scope="module")
def eos(checkpoint: ServableCheckpoint) -> int:
    """A token that good beams do come to, so that some end early."""
    with LLM(str(checkpoint.directory), **OPTIONS) as llm:
        [found] = llm.beam_search(PROMPTS[0], BeamSearchParams(4, 4, ignore_eos=True))
    return found.sequences[1].tokens[len(PROMPTS[0]) + 2]


@pytest.fixture(scope="module")
def llm(checkpoint: ServableCheckpoint, eos: int):
    override = {"eos_token_id": eos}
    directory = str(checkpoint.directory)
    with LLM(directory, override_generation_config=override, **OPTIONS) as llm:
        yield llm
        scheduler = llm._core._core.scheduler
        check_invariants(scheduler)
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable, "a block leaked"


def plain_beam_search(
    model: torch.nn.Module, prompt: list[int], params: BeamSearchParams, eos: int
) -> list[tuple[list[int], float]]:
    """vLLM's algorithm with no cache, no cleverness and no early end: (tokens, cum_logprob), best first."""
    width = params.beam_width
    live, completed = [(prompt, 0.0)], []
    for _ in range(params.max_tokens or 0):
        proposals = []
        for tokens, total in live:
            with torch.inference_mode():
                row = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
            values, ids = row.topk(2 * width)
            for token, value in zip(ids.tolist(), values.tolist(), strict=True):
                ends = token == eos and not params.ignore_eos
                (completed if ends else proposals).append(([*tokens, token], total + value))
        live = sorted(proposals, key=lambda beam: -beam[1])[:width]

    def score(beam: tuple[list[int], float]) -> float:
        tokens, total = beam
        length = len(tokens) - (tokens[-1] == eos and not params.ignore_eos)
        return total / length**params.length_penalty

    return sorted(completed + live, key=score, reverse=True)[:width]


@pytest.mark.parametrize(
    "params",
    [
        BeamSearchParams(1, 6),
        BeamSearchParams(3, 6),
        BeamSearchParams(4, 5, ignore_eos=True),
        BeamSearchParams(4, 6, length_penalty=0.0),
        BeamSearchParams(4, 6, length_penalty=6.0),
        BeamSearchParams(4, 6, length_penalty=-4.0),
    ],
    ids=str,
)
def test_it_finds_what_a_plain_search_finds(
    llm: LLM, checkpoint: ServableCheckpoint, eos: int, params: BeamSearchParams
) -> None:
    outputs = llm.beam_search(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = plain_beam_search(checkpoint.reference, prompt, params, eos)
        assert [beam.tokens for beam in output.sequences] == [tokens for tokens, _ in expected]
        for beam, (tokens, total) in zip(output.sequences, expected, strict=True):
            assert beam.cum_logprob == pytest.approx(total, abs=1e-4)
            ended = tokens[-1] == eos and not params.ignore_eos
            assert beam.finish_reason == ("stop" if ended else None)
            assert beam.text == llm.model.tokenizer.decode(tokens, skip_special_tokens=False)
            chosen = tokens[len(prompt) :]
            values = [p[t].logprob for p, t in zip(beam.logprobs, chosen, strict=True)]
            assert sum(values) == pytest.approx(total, abs=1e-4)


def test_some_of_those_searches_had_beams_that_ended(llm: LLM) -> None:
    """Else the test above would say less than it seems to."""
    [output] = llm.beam_search(PROMPTS[0], BeamSearchParams(4, 6, length_penalty=-4.0))
    assert "stop" in [beam.finish_reason for beam in output.sequences]


def test_transformers_finds_the_same_where_nothing_ends(
    llm: LLM, checkpoint: ServableCheckpoint
) -> None:
    """There the two agree: its score leaves out the prompt, which all beams of one length share."""
    [output] = llm.beam_search(PROMPTS[0], BeamSearchParams(4, 6, ignore_eos=True))
    with torch.inference_mode():
        theirs = checkpoint.reference.generate(
            torch.tensor([PROMPTS[0]]),
            attention_mask=torch.ones(1, len(PROMPTS[0]), dtype=torch.long),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    assert [beam.tokens for beam in output.sequences] == theirs.tolist()


def test_beams_share_what_is_computed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is computed once, not once per beam and step."""
    llm.reset_prefix_cache()
    computed = 0
    take = llm._front.take

    def counting(message):
        nonlocal computed
        if isinstance(message, StepOutputs):
            computed += message.stats.step_tokens
        return take(message)

    monkeypatch.setattr(llm._front, "take", counting)
    llm.beam_search([[9] * 64], BeamSearchParams(4, 8, ignore_eos=True))
    assert 64 + 7 * 4 <= computed <= 64 + 2 * 7 * 4, (
        "not much more than a token for each beam and step"
    )


def test_a_drawn_token_is_considered_at_a_temperature(llm: LLM) -> None:
    params = BeamSearchParams(1, 8, ignore_eos=True, temperature=2.0)
    [output] = llm.beam_search(PROMPTS[0], params)
    assert any(len(position) == 3 for position in output.sequences[0].logprobs)


def test_the_score_is_vllms() -> None:
    """The prompt counts as length, the token that ends the sequence does not."""
    search = BeamSearch([1, 2], BeamSearchParams(2, 8, length_penalty=2.0), {0}, 8)
    assert search.score(BeamSearchSequence([1, 2, 3, 4], cum_logprob=-8.0)) == -0.5
    ended = BeamSearchSequence([1, 2, 3, 4, 0], cum_logprob=-8.0, finish_reason="stop")
    assert search.score(ended) == -0.5


def test_ties_go_to_the_better_beam_then_to_the_lowest_id() -> None:
    search = BeamSearch([1], BeamSearchParams(2, 4), set(), 4)
    search.advance([{token: Logprob(-1.0) for token in (9, 4, 7)}])
    assert [beam.tokens for beam in search.live] == [[1, 4], [1, 7]]
    search.advance([{token: Logprob(-1.0) for token in tokens} for tokens in ((8, 6), (3, 2))])
    assert [beam.tokens for beam in search.best()] == [[1, 4, 6], [1, 4, 8]]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.5, 3), st.sampled_from([-1, 0, 1]), st.integers(1, 4))
def test_ending_early_changes_no_result(seed: int, size: float, sign: int, width: int) -> None:
    """A search that is never settled is the plain one. Random models: logprobs by the tokens so far."""
    params = BeamSearchParams(width, 8, length_penalty=sign * size)
    ends = frozenset(range(30))

    def run(search: BeamSearch, seed: int) -> tuple[list[list[int]], int]:
        steps = 0
        while not search.done:
            search.advance([random_position(seed, beam.tokens, width) for beam in search.live])
            steps += 1
        return [beam.tokens for beam in search.best()], steps

    class Patient(BeamSearch):
        def _is_settled(self) -> bool:
            return not self.live

    for each in range(seed, seed + 4):
        quick, few = run(BeamSearch([1, 2], params, ends, 8), each)
        slow, many = run(Patient([1, 2], params, ends, 8), each)
        assert quick == slow and few <= many


def random_position(seed: int, tokens: list[int], width: int) -> dict[int, Logprob]:
    draw = random.Random(f"{seed}{tokens}")
    best = sorted((-draw.expovariate(1.0), draw.randrange(100)) for _ in range(2 * width))
    return {token: Logprob(value) for value, token in reversed(best)}


def test_what_cannot_be_is_refused(llm: LLM) -> None:
    for field, options in {
        "beam_width": {"beam_width": 0},
        "max_tokens": {"max_tokens": 0},
        "n": {"n": 3},
        "temperature": {"temperature": 2.5},
        "length_penalty": {"length_penalty": float("nan")},
        "structured_outputs": {"structured_outputs": StructuredOutputsParams(regex="a")},
    }.items():
        with pytest.raises(InvalidParameterError) as raised:
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **options})
        assert raised.value.param == field
    with pytest.raises(PromptTooLongError):
        llm.beam_search([[1] * 100], BeamSearchParams(2, 100))
    with pytest.raises(InvalidParameterError):
        llm.beam_search([[1] * 128], BeamSearchParams(2, 1))


@pytest.mark.asyncio
async def test_streams_give_what_llm_gives_and_can_be_ended(
    llm: LLM, checkpoint: ServableCheckpoint, eos: int
) -> None:
    config = from_flat(
        {
            "model": str(checkpoint.directory),
            "override_generation_config": {"eos_token_id": eos},
            "max_logprobs": 1,
            **OPTIONS,
        }
    )
    params = BeamSearchParams(4, 6, length_penalty=-4.0, n=3)
    [expected] = llm.beam_search(PROMPTS[0], params)
    engine = await AsyncLLM.start(config)
    try:
        [output] = [o async for o in engine.submit(PROMPTS[0], params, request_id="mine")]
        assert output.finished and output.request_id == "mine"
        assert len(output.outputs) == 3
        for index, (part, beam) in enumerate(zip(output.outputs, expected.sequences, strict=True)):
            assert part.index == index
            assert part.token_ids == beam.tokens[4:]
            assert part.cumulative_logprob == beam.cum_logprob
            assert part.finish_reason == (beam.finish_reason or "length")
            shown = part.token_ids[:-1] if part.finish_reason == "stop" else part.token_ids
            assert part.text == llm.model.tokenizer.decode(shown)

        with pytest.raises(InvalidParameterError, match="max-logprobs"):
            engine.submit([1], SamplingParams(logprobs=2))

        stream = engine.submit(PROMPTS[0], BeamSearchParams(4, 100, ignore_eos=True))
        asyncio.get_running_loop().call_soon(stream.abort)
        [ended] = [o async for o in stream]
        assert {part.finish_reason for part in ended.outputs} == {"abort"}
        assert not engine._front.is_busy

        task = asyncio.ensure_future(anext(aiter(engine.submit(PROMPTS[0], params))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.sleep()  # waits for searches, of which there are none any more
        await engine.wake_up()
    finally:
        await engine.shutdown()
