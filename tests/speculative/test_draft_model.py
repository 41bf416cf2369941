"""A draft model: its loop in C and in Python, its second KV cache, and the built-in pair in an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from quire import LLM, SamplingParams
from quire.builtin import DRAFT_DIR, MODEL_DIR
from quire.config import from_flat
from quire.engine.setup import locate, resolve
from quire.errors import ConfigError
from quire.kernels.cpu.native import NativeKernels
from quire.models.eager_pass import EagerPass
from quire.models.loader import load_model
from quire.speculative.base import DraftTask
from quire.speculative.draft_model import DraftModel, PlainDrafting
from quire.weights.source import open_source
from tests.speculative.plans import Seating

OPTIONS = {"speculative_config": {"method": "draft_model"}}


@pytest.fixture(scope="module")
def draft():
    spec = resolve(locate(from_flat(OPTIONS))).draft
    assert spec is not None
    return load_model(
        spec.model,
        open_source(spec.directory),
        dtype=torch.bfloat16,
        kernels=NativeKernels(),
        max_model_len=256,
    )


def texts(count: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [
        random.integers(3, 4000, size=int(random.integers(2, 60))).tolist() for _ in range(count)
    ]


def make_drafter(draft, seating: Seating, **options: object) -> DraftModel:
    drafter = DraftModel(draft, NativeKernels(), **{"most": 5, "vocab_size": 4096, **options})
    drafter.open_cache(seating.rows, seating.num_blocks, seating.block_size)
    return drafter


def fresh(draft, seating: Seating, text: list[int], most: int, **decoding: object) -> list[int]:
    """The drafts of a drafter that has seen nothing else."""
    alone = Seating()
    drafter = make_drafter(draft, alone)
    alone.admit(drafter, 0, text, **decoding)
    [drafts] = drafter.propose([DraftTask(alone.seat_of[0], len(text), most)])
    return list(drafts)


def test_rows_draft_alone_as_in_a_batch_and_as_the_plain_loop(draft) -> None:
    batch, wanted = texts(6), [5, 1, 3, 5, 2, 4]
    parameters = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "top_k": 20}] * 3
    found = []
    for plain in (False, True):
        seating = Seating()
        drafter = make_drafter(draft, seating)
        if plain:
            loop = EagerPass(draft, drafter._cache.kv)
            drafter._loop = PlainDrafting(loop, NativeKernels(), drafter._rows, 5)
        for number, (text, chosen) in enumerate(zip(batch, parameters, strict=True)):
            seating.admit(drafter, number, text, **chosen)
        tasks = [
            DraftTask(seating.seat_of[i], len(text), most)
            for i, (text, most) in enumerate(zip(batch, wanted, strict=True))
        ]
        found.append([list(drafts) for drafts in drafter.propose(tasks)])
    assert found[0] == found[1]
    assert [len(drafts) for drafts in found[0]] == wanted
    for text, most, chosen, drafts in zip(batch, wanted, parameters, found[0], strict=True):
        assert drafts == fresh(draft, seating, text, most, **chosen)


def test_drafts_are_those_of_a_draft_that_computes_all_anew(draft) -> None:
    """Through right and wrong drafts and block boundaries, what is kept gives the same drafts."""
    seating = Seating()
    drafter = make_drafter(draft, seating)
    [text] = texts(1)
    seating.admit(drafter, 0, text)
    random = np.random.default_rng(1)
    for _ in range(40):
        seating.step(drafter, 0, text)
        [drafts] = drafter.propose([DraftTask(seating.seat_of[0], len(text), 4)])
        assert list(drafts) == fresh(draft, seating, text, 4)
        right, more = int(random.integers(0, 5)), int(random.integers(1, 4))  # more: nobody asked
        text = [*text, *drafts[:right], *random.integers(3, 4000, size=more).tolist()]


def test_blocks_that_are_found_need_no_catching_up(draft) -> None:
    seating = Seating()
    drafter = make_drafter(draft, seating)
    text = list(range(10, 10 + 40))
    blocks = seating.admit(drafter, 0, text)
    drafter.propose([DraftTask(seating.seat_of[0], len(text), 2)])
    # Shares two full blocks, and copies 5 tokens of the third.
    other = [*text[:37], 7, 8]
    seating.admit(drafter, 1, other, start=37, shared=blocks[:2], copy_of=blocks[2])
    seat = seating.seat_of[1]
    assert drafter._cache.first_missing(seat, len(other)) == 37
    [drafts] = drafter.propose([DraftTask(seat, len(other), 4)])
    assert list(drafts) == fresh(draft, seating, other, 4)


def test_a_block_given_to_another_request_has_nothing_valid(draft) -> None:
    seating = Seating()
    drafter = make_drafter(draft, seating)
    text = list(range(10, 42))
    seating.admit(drafter, 0, text)
    drafter.propose([DraftTask(seating.seat_of[0], len(text), 2)])
    seating.release(drafter, 0)
    seating.admit(drafter, 1, text[::-1])  # gets the same blocks
    assert drafter._cache.first_missing(seating.seat_of[1], len(text)) == 0
    [drafts] = drafter.propose([DraftTask(seating.seat_of[1], len(text), 4)])
    assert list(drafts) == fresh(draft, seating, text[::-1], 4)


def test_requests_of_one_prefix_catch_up_once(draft) -> None:
    seating = Seating()
    drafter = make_drafter(draft, seating)
    text = list(range(10, 58))
    blocks = seating.admit(drafter, 0, text)
    seating.admit(drafter, 1, [*text, 5], start=48, shared=blocks)
    tasks = [DraftTask(seating.seat_of[0], 48, 3), DraftTask(seating.seat_of[1], 49, 3)]
    first, second = drafter.propose(tasks)
    assert len(first) == 3 and second == ()
    assert drafter._cache.first_missing(seating.seat_of[1], 49) == 48


def test_ids_that_the_draft_does_not_have_end_its_drafting(draft) -> None:
    seating = Seating()
    drafter = make_drafter(draft, seating, vocab_size=5000)
    seating.admit(drafter, 0, [5, 4999, 6])
    assert list(drafter.propose([DraftTask(seating.seat_of[0], 3, 3)])) == [()]


def test_no_drafts_beyond_the_draft_models_positions(draft) -> None:
    seating = Seating(max_model_len=400)
    drafter = make_drafter(draft, seating)
    text = texts(1)[0] * 40
    seating.admit(drafter, 0, text[:254])
    [drafts] = drafter.propose([DraftTask(seating.seat_of[0], 254, 5)])
    assert len(drafts) == 2  # 256 positions
    seating.admit(drafter, 1, text[:300])
    assert list(drafter.propose([DraftTask(seating.seat_of[1], 300, 5)])) == [()]


# --- the engine -----------------------------------------------------------------------------------

PROMPTS = [
    "Write a function that adds two numbers.",
    "What is a block table?",
    "List three fruits.",
]
PARAMETERS = [
    SamplingParams(max_tokens=40, temperature=0.0),
    SamplingParams(max_tokens=40, temperature=1.0, seed=11),
    SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, seed=2, n=2),
]


@pytest.mark.parametrize("method", ["draft_model", "ngram", "suffix"])
def test_the_built_in_pair_says_the_same(method: str) -> None:
    outputs, steps = [], []
    for options in ({}, {"speculative_config": {"method": method}}):
        with LLM(**options) as llm:
            chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS] * 2
            found = llm.chat(chats, PARAMETERS * 2, use_tqdm=False)
            outputs.append([[each.token_ids for each in result.outputs] for result in found])
            steps.append(llm._core._core.scheduler._step_id)
    assert outputs[0] == outputs[1]
    assert steps[1] < steps[0] or method != "draft_model"


def copy_draft(path: Path, **changes: object) -> Path:
    shutil.copytree(DRAFT_DIR, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def refusal(**options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(locate(from_flat(options)))
    return str(caught.value)


def test_a_draft_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = copy_draft(tmp_path / "draft")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    (first, a), (second, b) = list(vocab.items())[300:302]
    vocab |= {first: b, second: a}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refusal(spec_model=str(path))
    assert (
        "another vocabulary" in message and "4 entries differ" in message and repr(first) in message
    )


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    assert "needs a model" in refusal(model=str(MODEL_DIR), spec_method="draft_model")
    options = {"method": "draft_model", "max_model_len": 5000}
    assert "2048 positions" in refusal(speculative_config=options)


def test_the_draft_is_in_the_ledger() -> None:
    with LLM(max_model_len=256, num_gpu_blocks_override=20) as llm:
        plain = llm.ready
    with LLM(max_model_len=256, num_gpu_blocks_override=20, **OPTIONS) as llm:
        ready = llm.ready
    assert ready.weight_bytes - plain.weight_bytes > 600_000
    assert ready.kv_bytes - plain.kv_bytes == 20 * 16 * 256


def test_it_sleeps_and_wakes() -> None:
    with LLM(**OPTIONS) as llm:
        before = llm.generate(PROMPTS, PARAMETERS[0], use_tqdm=False)
        llm.sleep(1)
        llm.wake_up()
        after = llm.generate(PROMPTS, PARAMETERS[0], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in before] == [o.outputs[0].token_ids for o in after]
