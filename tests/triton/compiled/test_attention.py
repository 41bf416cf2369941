"""What attention compiles to at the shapes of real models: no spills, and wgmma for prompts on Hopper."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quire.kernels.triton import attention, tuning
from quire.kernels.triton.matmul import matmul
from tests.triton.harness import SHARED_LIMIT, Report, compile_launches, shared_memory

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Case:
    q_heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 64
    cache: torch.dtype = BF16
    window: int = 0
    softcap: float = 0.0
    decode_query_len: int = 1
    invariant: bool = False
    arch: int = 90

    def launch(self, dtype: torch.dtype = BF16, requests: int = 64, tokens: int = 512) -> None:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        shape = (1000, self.kv_heads, self.block_size, self.head_dim)
        k_cache, v_cache = (empty(*shape, dtype=self.cache) for _ in range(2))
        fused = empty(tokens, self.q_heads + 2 * self.kv_heads, self.head_dim)
        max_len = 32768
        scale = empty(self.kv_heads, dtype=torch.float32) if self.cache is FP8 else None
        floats = attention.workspace_floats(
            k_cache,
            q_heads=self.q_heads,
            max_requests=requests,
            max_len=max_len,
            window=self.window,
            decode_query_len=self.decode_query_len,
            invariant=self.invariant,
        )
        attention.paged_attention(
            fused[:, : self.q_heads],
            k_cache,
            v_cache,
            empty(requests, max_len // self.block_size, dtype=torch.int32),
            empty(requests + 1, dtype=torch.int32),
            empty(requests, dtype=torch.int32),
            scale=self.head_dim**-0.5,
            max_query_len=tokens,
            decode_query_len=self.decode_query_len,
            window=self.window,
            softcap=self.softcap,
            k_scale=scale,
            v_scale=scale,
            invariant=self.invariant,
            out=empty(tokens, self.q_heads, self.head_dim),
            workspace=empty(floats, dtype=torch.float32),
            arrived=empty(requests * self.kv_heads, dtype=torch.int32),
        )

    def compile(self) -> dict[str, Report]:
        reports = {
            report.kernel: report for report in compile_launches(self.launch, arch=self.arch)
        }
        assert set(reports) == {"tile_kernel", "split_kernel"}
        for report in reports.values():
            # The merge of splits may push two scalars out of registers, outside the loops.
            report.assert_fits(self.arch, stack=16 if report.kernel == "split_kernel" else 0)
        return reports


LLAMA_8B = Case(32, 8, 128)
GEMMA = Case(8, 4, 256, window=1024, softcap=50.0)
CASES = {
    "Llama-3.1-8B": LLAMA_8B,
    "Llama-3.1-8B, blocks of 16": dataclasses.replace(LLAMA_8B, block_size=16),
    "Llama-3.1-8B, fp8": dataclasses.replace(LLAMA_8B, cache=FP8),
    "Llama-3.1-8B, invariant": dataclasses.replace(LLAMA_8B, invariant=True),
    "Qwen3-0.6B": Case(16, 8, 128),
    "Llama-3.2-1B": Case(32, 8, 64),
    "Qwen2.5-0.5B, speculating": Case(14, 2, 64, block_size=16, decode_query_len=4),
    "head_dim 96": Case(32, 32, 96, block_size=32),
    "like Gemma, fp8": dataclasses.replace(GEMMA, block_size=16, cache=FP8),
    "like Gemma, invariant": dataclasses.replace(GEMMA, invariant=True),
    "Llama-3.1-8B on sm_80": dataclasses.replace(LLAMA_8B, block_size=16, arch=80),
    "like Gemma on sm_80": dataclasses.replace(GEMMA, arch=80),
    "Llama-3.1-8B on sm_100": dataclasses.replace(LLAMA_8B, arch=100),
    "like Gemma on sm_100": dataclasses.replace(GEMMA, arch=100),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_no_spills_and_the_matrix_instructions_of_the_device(case: Case) -> None:
    reports = case.compile()
    tile, split = reports["tile_kernel"], reports["split_kernel"]
    assert tile.cp_async and split.cp_async  # loads overlap with arithmetic
    # Rows too few for the large instructions: 16 in decode; 32 in invariance with wide heads, which
    # keeps two sets of sums, and needs the same instruction in both kernels.
    large = not (case.invariant and case.head_dim > 128)
    assert bool(tile.wgmma) == (large and case.arch == 90)
    assert bool(tile.tcgen05) == (large and case.arch == 100)
    assert bool(tile.mma) == (case.arch == 80 or not large)
    eight_bits = case.cache is FP8 and case.arch == 90 and case.head_dim <= 128
    assert bool(split.wgmma) == (large and (case.invariant or eight_bits))
    if eight_bits:  # decoding is bound by instructions: for 64 keys of 16 KiB they were 677 a warp
        assert not split.byte_loads and 0 < split.loop <= 450, split
    assert split.shared * 2 <= SHARED_LIMIT[case.arch]  # two programs a multiprocessor


@pytest.mark.parametrize("regime", tuning.CANDIDATES)
def test_candidates_for_the_first_run_on_a_device_fit(
    regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = tuning.tile
    for choice in tuning.CANDIDATES[regime]:
        monkeypatch.setattr(
            attention,
            "tile",
            lambda key, choice=choice: choice if key.regime == regime else default(key),
        )
        for report in compile_launches(dataclasses.replace(LLAMA_8B, block_size=16).launch):
            report.assert_fits(90, stack=16 if report.kernel == "split_kernel" else 0)


@pytest.mark.parametrize("arch", [86, 120, "gfx942"])
def test_little_shared_memory_suffices(arch: int | str) -> None:
    """Of the products and the attention of --batch-invariant, and of decoding; two programs at once."""

    def launch() -> None:
        for invariant in (False, True):
            dataclasses.replace(LLAMA_8B, block_size=16, invariant=invariant).launch()
        x = torch.empty(7, 4096, dtype=BF16, device="meta")
        matmul(x, torch.empty(4096, 4096, dtype=BF16, device="meta"))

    for kernel, shared in shared_memory(launch, arch):
        assert shared <= SHARED_LIMIT[arch], (kernel, shared)


@pytest.mark.parametrize("case", [LLAMA_8B, dataclasses.replace(LLAMA_8B, cache=FP8, arch=100)])
def test_the_copy_engine_where_the_table_says_so(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = tuning.tile
    monkeypatch.setattr(
        attention, "tile", lambda key: dataclasses.replace(default(key), tma=True, stages=2)
    )
    reports = case.compile()
    assert reports["tile_kernel"].tma and reports["split_kernel"].tma
    assert not reports["tile_kernel"].cp_async


def test_a_step_launches_only_what_it_needs() -> None:
    def kernels(**options: int) -> list[str]:
        return [r.kernel for r in compile_launches(lambda: launch(**options))]

    def launch(**options: int) -> None:
        def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        cache = empty(9, 2, 64, 64)
        attention.paged_attention(
            empty(8, 4, 64),
            cache,
            cache,
            empty(8, 2, dtype=torch.int32),
            empty(9, dtype=torch.int32),
            empty(8, dtype=torch.int32),
            scale=0.1,
            out=empty(8, 4, 64),
            workspace=empty(10**5, dtype=torch.float32),
            **options,
        )

    assert kernels(max_query_len=1) == ["split_kernel"]  # 128 keys at most: one split, no merge
    assert kernels(max_query_len=8, min_query_len=2) == ["tile_kernel"]
