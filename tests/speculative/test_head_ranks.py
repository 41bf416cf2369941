"""Heads on several ranks: the answers and the drafts of one device, from whole copies of the target's
embedding and output head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from quire.config import from_flat
from quire.engine.assemble import estimate_ranks, parts_of
from quire.engine.dry_run import weight_kinds
from quire.engine.llm import LLM
from quire.engine.setup import locate, resolve
from quire.errors import ConfigError
from quire.kernels.select import create_kernels
from quire.layers.eager import _rows
from quire.models.copies import load_copies
from quire.models.loader import load_model
from quire.runner.footprint import host_memory
from quire.sampling_params import SamplingParams
from quire.scheduler.draft_policy import DraftPolicy
from quire.speculative.base import DraftTask
from quire.speculative.heads import HeadDrafter
from quire.speculative.spec import HeadDraftSpec
from quire.weights.source import open_source
from tests.engine.checkpoints import ServableCheckpoint, prompts, write_checkpoint
from tests.engine.test_compose import said
from tests.speculative.reference_heads import save_head
from tests.speculative.test_head_files import mimo, options, target
from tests.speculative.test_heads import FORMS, make_llm, right

__all__ = ["mimo", "target"]

GREEDY = SamplingParams(
    temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=3, prompt_logprobs=2
)
DRAWN = SamplingParams(temperature=0.8, seed=5, max_tokens=16, ignore_eos=True, logprobs=2)


class Drafts(dict[tuple[int, ...], list[int]]):
    """What is proposed, by the known tokens."""

    answer: Callable[[list[int], int], list[int]] | None = None
    """Drafts to return instead: those of random weights are never accepted."""


def taken_from(drafts: Drafts) -> Drafts:
    found = Drafts(drafts)
    drafts.clear()
    return found


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drafts]:
    """Of the engines in this process, which make all the drafts that there may be, in each step."""
    made = Drafts()
    propose = HeadDrafter.propose

    def record(drafter: HeadDrafter, tasks: Sequence[DraftTask]) -> Sequence[Sequence[int]]:
        found = propose(drafter, tasks)
        known = [drafter._rows.token_ids[each.seat, : each.num_tokens].tolist() for each in tasks]
        made.update({tuple(k): list(d) for k, d in zip(known, found, strict=True)})
        answer = made.answer
        if answer is None:
            return found
        return [answer(k, each.most) for k, each in zip(known, tasks, strict=True)]

    monkeypatch.setattr(HeadDrafter, "propose", record)
    with mock.patch("quire.scheduler.drafting.AdaptivePolicy", return_value=DraftPolicy()):
        yield made


@pytest.mark.parametrize("name", ["eagle", "eagle3", "mimo"])
def test_answers_and_drafts_are_those_of_one_device(
    name: str, target: ServableCheckpoint, mimo: ServableCheckpoint, tmp_path: Path, drafts: Drafts
) -> None:
    """Also where drafts are accepted, and after sleep."""
    form, batch = FORMS[name], prompts(4, longest=50)
    used = mimo if name == "mimo" else target
    given = options(form.method)
    if name != "mimo":
        given["model"] = str(save_head(form, used.reference.config, tmp_path))

    def run(llm: LLM) -> list[Any]:
        return [
            [said(each) for each in llm.generate(batch, params, use_tqdm=False)]
            for params in (GREEDY, DRAWN)
        ]

    with make_llm(used) as llm:
        plain = run(llm)
        outputs = llm.generate(batch, GREEDY, use_tqdm=False)
        texts = [list(each.outputs[0].token_ids) for each in outputs]
    assert not drafts
    made: list[tuple[Drafts, Drafts]] = []
    for size in (1, 2):
        sizes = {"tensor_parallel_size": size, "worker_timeout": 30.0, "max_num_batched_tokens": 32}
        with make_llm(used, speculative_config=given, **sizes) as llm:
            assert run(llm) == plain
            rejected = taken_from(drafts)
            for level in (1, 2) if size == 2 else ():
                llm.sleep(level)
                llm.wake_up()
                assert run(llm) == plain
                assert taken_from(drafts) == rejected
            drafts.answer = right(texts, batch, wrong=3)
            again = llm.generate(batch, GREEDY, use_tqdm=False)
            assert [said(each) for each in again] == plain[0]
            made.append((rejected, taken_from(drafts)))
            drafts.answer = None
    (rejected, accepted), (rejected_by_ranks, accepted_by_ranks) = made
    assert rejected == rejected_by_ranks
    # Where drafts are accepted, how many a step takes depends on what else runs in it, so on when the
    # requests arrived: drafts are asked for after other tokens, but after the same tokens they are the same.
    both = accepted.keys() & accepted_by_ranks.keys()
    assert [accepted[each] for each in both] == [accepted_by_ranks[each] for each in both]
    assert len(both) > len(accepted) / 2
    assert any(rejected.values()) and any(accepted.values())
    assert len(accepted) < len(rejected) / 3, "of half as many requests, in fewer steps"


VARIANTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "untied": ("llama", {"tie_word_embeddings": False}, None),
    "tied": ("llama", {"tie_word_embeddings": True}, None),
    "softcap": ("gemma2", {}, None),
    "divisor": ("granite", {"tie_word_embeddings": False}, None),
    "int8": ("llama", {"tie_word_embeddings": False}, "int8"),
    "int8 tied": ("qwen3", {"tie_word_embeddings": True}, "int8"),
}


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["eagle", "eagle-embedding-bias", "eagle3", "eagle3-embedding"])
def test_copies_are_the_targets(form: str, variant: str, load_format: Any, tmp_path: Path) -> None:
    """Bit for bit, and what they take is planned."""
    family, fields, quantization = VARIANTS[variant]
    used = write_checkpoint(family, tmp_path / "target", num_hidden_layers=4, **fields)
    head = save_head(FORMS[form], used.reference.config, tmp_path / "head")
    config = locate(
        from_flat(
            {
                "model": str(used.directory), "quantization": quantization, "max_model_len": 256,
                "tensor_parallel_size": 2, "speculative_config": options(FORMS[form].method, head),
            }
        )
    )  # fmt: skip
    resolved = resolve(config)
    draft = resolved.draft
    assert isinstance(draft, HeadDraftSpec)
    dtype = getattr(torch, resolved.dtype)
    kernels, source = create_kernels("auto"), open_source(used.directory)
    whole = load_model(
        resolved.spec, source, dtype=dtype, kernels=kernels, load_format=load_format, max_model_len=64
    )  # fmt: skip
    seed = 0 if load_format == "dummy" else None
    copies = load_copies(draft.head, source, dtype=dtype, kernels=kernels, random_seed=seed)
    if not draft.head.has_embedding:
        ids = torch.arange(resolved.spec.vocab_size)
        assert copies.embedded is not None
        assert torch.equal(_rows(copies.embedded, ids), _rows(whole.embedded, ids))
    if draft.head.draft_vocab_size is None:
        hidden = torch.randn(5, resolved.spec.hidden_size).to(dtype)
        assert torch.equal(copies.compute_logits(hidden), whole.compute_logits(hidden))
    first, second = parts_of(config, resolved)
    assert second.draft is None and first.taps == second.taps == draft.head.taps
    assert first.draft is not None
    taken = first.draft.weight_bytes - draft.weight_bytes
    found = estimate_ranks(config, resolved, host_memory())
    alone = estimate_ranks(config, dataclasses.replace(resolved, draft=None), host_memory())
    added = [a.weight_bytes - b.weight_bytes for a, b in zip(found.ranks, alone.ranks, strict=True)]
    assert added == [first.draft.weight_bytes, 0]
    kinds = [
        weight_kinds(part, each, dtype.itemsize)
        for part, each in zip((first, second), found.ranks, strict=True)
    ]
    assert [each["draft model"] for each in kinds] == added
    assert kinds[0]["rotary tables"] == kinds[1]["rotary tables"]
    stored = sum(
        shape.numel() * dtype.itemsize
        for each in copies.targets()
        for shape in [torch.empty(each.shape, device="meta")]
    )
    if quantization is None:
        assert taken == stored
    else:
        assert taken <= stored and (taken > 0) == (stored > 0)


def test_pipelines_are_refused(target: ServableCheckpoint, tmp_path: Path) -> None:
    head = save_head(FORMS["eagle"], target.reference.config, tmp_path)
    with pytest.raises(
        ConfigError, match=r"pipeline_parallel_size above 1 .* method eagle, .* use tensor"
    ):
        make_llm(target, pipeline_parallel_size=2, speculative_config=options("eagle", head))
