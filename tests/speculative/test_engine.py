"""Speculation in a whole engine: the same outputs in fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quire.engine.llm import LLM
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
