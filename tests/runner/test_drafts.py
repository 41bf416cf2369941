"""Drafts change how many steps a request takes, and nothing else: tokens and logprobs are the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.config import from_flat
from quire.runner.footprint import WorkerSpec
from quire.runner.worker import Worker
from tests.models.test_loader import spec_of
from tests.models.variants import build_reference, save
from tests.runner.drafting import BLOCKS_EACH, COUNT, generate, nearly_right


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build_reference("llama"), tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_same_bits_in_fewer_steps(folder: Path, kernels: str) -> None:
    config = from_flat({"max_num_seqs": 8, "max_num_batched_tokens": 32, "kernels": kernels})
    spec = WorkerSpec(
        model=spec_of(folder), directory=folder, dtype="float32", kv_cache_dtype="float32",
        device="cpu", max_model_len=32,
    )  # fmt: skip
    worker = Worker(config, spec)
    worker.load()
    worker.open_cache(1 + 2 * BLOCKS_EACH, 32)
    plain = generate(worker)
    drafted = generate(worker, nearly_right(plain))
    for request, mine in plain.items():
        assert mine.steps == len(mine.tokens) == COUNT
        assert drafted[request].tokens == mine.tokens
        assert drafted[request].logprobs == mine.logprobs
        assert drafted[request].steps < mine.steps
    # All wrong costs steps that verify in vain, and nothing else.
    wrong = generate(worker, lambda request, count: [1, 2, 1])
    assert {k: v.tokens for k, v in wrong.items()} == {k: v.tokens for k, v in plain.items()}
