"""A row that points outside is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quire.attention.base import KVCache
from quire.kernels.base import Kernels
from quire.kernels.checks import KernelArgumentError
from quire.kernels.program import StepRows
from tests.models.conftest import Pair

ROWS = StepRows(
    token_ids=np.ones((2, 20), dtype=np.int64),
    block_ids=np.ones((1, 2, 2), dtype=np.int32),
    rows=np.array([[1, 3, 1, 1], [0, 0, 17, 1]]),
    num_rows=2,
    num_wanted=2,
)


def with_row(column: int, value: int) -> np.ndarray:
    rows = ROWS.rows.copy()
    rows[1, column] = value
    return rows


def test_rows_outside_are_refused(pair: Callable[..., Pair], kernels: Kernels) -> None:
    if kernels.name != "native":
        pytest.skip("the layers index with PyTorch, which checks")
    _, model = pair("llama", kernels)
    cache = KVCache(
        num_parts=model.spec.kv.layers_per_page,
        num_blocks=3,
        num_kv_heads=model.spec.heads.num_kv_heads,
        head_dim=model.spec.heads.head_dim,
        block_size=16,
        dtype=model.dtype,
    )
    cache.storage.fill_(7.0)
    decoder = model.over(cache)
    far = 2**40
    wrong: list[tuple[str, Any]] = [
        *(("rows", with_row(0, seat)) for seat in (-1, 2, far)),
        *(("rows", with_row(1, start)) for start in (-1, 4, far, 2**63 - 18)),
        *(("rows", with_row(2, count)) for count in (0, -1, 21, far, 2**63 - 2)),
        *(("rows", with_row(3, wanted)) for wanted in (-1, 2, 18, far)),
        *(("block_ids", ROWS.block_ids * block) for block in (-1, 3, 2**30)),
        *(("token_ids", ROWS.token_ids * token) for token in (-1, model.spec.vocab_size, far)),
        ("block_ids", ROWS.block_ids[:, :1].copy()),
        ("block_ids", ROWS.block_ids[:0].copy()),
        ("token_ids", ROWS.token_ids[:, ::2]),
        ("rows", ROWS.rows[:, :3].copy()),
        ("rows", ROWS.rows.astype(np.float64)),
        *(("num_rows", count) for count in (-1, 1, 3)),
        *(("num_wanted", count) for count in (-1, 0, 1, 3)),
    ]
    for name, value in wrong:
        with pytest.raises(KernelArgumentError):
            decoder.forward(replace(ROWS, **{name: value}))
        assert bool((cache.storage == 7.0).all())
    assert decoder.forward(ROWS).shape == (2, model.spec.vocab_size)
    assert bool(torch.isfinite(decoder.forward(ROWS)).all())
