"""Speculation in a whole engine: the same outputs in fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from quire.config import from_flat
from quire.engine.assemble import build_scheduler
from quire.engine.llm import LLM
from quire.sampling_params import BeamSearchParams
from quire.scheduler.draft_policy import DraftPolicy
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_exactness import GREEDY, make_llm, tokens_of
from tests.speculative.scripted import ScriptedDrafter, drafting


def steps_of(llm: LLM) -> int:
    return llm._core._core.scheduler._step_id


def test_right_drafts_save_steps_and_change_nothing(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    batch = prompts(4)
    with make_llm(servable("llama")) as llm:
        expected = tokens_of(llm.generate(batch, GREEDY, use_tqdm=False))
        plain = steps_of(llm)
    texts = [[*prompt, *output] for prompt, output in zip(batch, expected, strict=True)]

    def guess(tokens: list[int], most: int) -> Sequence[int]:
        [text] = {tuple(t) for t in texts if t[: len(tokens)] == tokens}
        return text[len(tokens) : len(tokens) + most]

    drafter = ScriptedDrafter(guess)
    with drafting(lambda model: drafter), make_llm(servable("llama")) as llm:
        llm._core._core.scheduler.drafting.policy = DraftPolicy()
        assert tokens_of(llm.generate(batch, GREEDY, use_tqdm=False)) == expected
        assert steps_of(llm) < plain / 3
    assert drafter.asked


def test_beams_are_not_drafted(servable: Callable[[str], ServableCheckpoint]) -> None:
    """Each step of a beam is a request for one token."""
    params = BeamSearchParams(3, 8, ignore_eos=True)
    batch = prompts(2)
    with make_llm(servable("llama")) as llm:
        expected = [output.sequences for output in llm.beam_search(batch, params)]
    drafter = ScriptedDrafter(lambda tokens, most: [1] * most)
    with drafting(lambda model: drafter), make_llm(servable("llama")) as llm:
        llm._core._core.scheduler.drafting.policy = DraftPolicy()
        assert [output.sequences for output in llm.beam_search(batch, params)] == expected
    assert drafter.asked == 0


def test_one_seat_has_room_for_drafts_and_a_gpu_for_as_many_samples_as_seats() -> None:
    config = from_flat({"max_num_seqs": 1, "spec_method": "ngram", "spec_tokens": 5})
    assert config.max_drafts == 5 and config.max_samples == 6
    many = from_flat({"max_num_seqs": 64, "spec_method": "ngram", "spec_tokens": 5})
    assert many.max_samples == 128
    assert from_flat({"max_num_seqs": 64}).max_samples == 64
    layout = SimpleNamespace(windows=(None,))
    memory = SimpleNamespace(num_blocks=50, block_size=16, max_model_len=64)
    for gpu, samples in ((False, 6), (True, 1)):
        scheduler = build_scheduler(config, layout, memory, gpu=gpu)  # type: ignore[arg-type]
        assert scheduler.limits.max_samples == samples
