from __future__ import annotations

import pytest
import torch
import triton

from quire.kernels.triton.batch import DeviceBatch, append_tokens, build_step, copy_blocks
from quire.kernels.triton.packing import BatchShape
from tests.triton.harness import ARCHES, compile_launches

META = torch.device("meta")


@pytest.mark.parametrize("arch", ARCHES)
def test_one_binary_serves_every_batch(arch: int) -> None:
    shape = BatchShape(max_seqs=256, max_tokens=8192, max_blocks=2048)
    batch = DeviceBatch.create(shape, max_model_len=131072, block_size=64, device=META)
    storage = torch.empty(32, 2, 100, 8, 64, 128, dtype=torch.bfloat16, device=META)

    def launch() -> None:
        compiled: list[str] = []
        triton.knobs.runtime.jit_cache_hook = lambda fn, **_: compiled.append(fn.name)
        for rows, tokens, pairs in ((1, 1, 1), (16, 16, 3), (255, 8192, 16)):
            build_step(batch, num_rows=rows, num_tokens=tokens)
            append_tokens(batch, torch.empty(rows, dtype=torch.int64, device=META))
            index = torch.empty(2, pairs, dtype=torch.int64, device=META)
            copy_blocks(storage, index[0], index[1])  # with 3 pairs not on 16 bytes

        assert len(compiled) == 3, compiled

    for report in compile_launches(launch, arch=arch):
        report.assert_fits(arch)
