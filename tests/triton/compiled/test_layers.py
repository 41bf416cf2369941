from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quire.kernels.triton import layers
from tests.triton.harness import CompileFailed, compile_launches

EPS, TOKENS, BF16 = 1e-6, 7, torch.bfloat16


@dataclass(frozen=True, slots=True)
class Model:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    rotary_dim: int = 128
    normed_heads: bool = False


MODELS = {
    "llama-8b": Model(hidden=4096, inner=14336, heads=32, kv_heads=8),
    "qwen3-0.6b": Model(hidden=1024, inner=3072, heads=16, kv_heads=8, normed_heads=True),
    "partly rotated": Model(5120, 13824, heads=40, kv_heads=40, head_dim=80, rotary_dim=32),
    "llama-405b": Model(hidden=16384, inner=53248, heads=128, kv_heads=8),
}


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rope_write_kv(model: Model, *, fp8: bool) -> None:
    cache = meta(99, model.kv_heads, 64, model.head_dim, dtype=torch.float8_e4m3fn if fp8 else BF16)
    norm = meta(model.head_dim) if model.normed_heads else None
    scale = meta(model.kv_heads, dtype=torch.float32) if fp8 else None
    index = meta(TOKENS, dtype=torch.int64)
    layers.rope_write_kv(
        meta(TOKENS, (model.heads + 2 * model.kv_heads) * model.head_dim), index,
        meta(4096, model.rotary_dim, dtype=torch.float32), cache, cache, index,
        q_norm=norm, k_norm=norm, eps=EPS, k_scale=scale, v_scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arch"), [("llama-8b", 80), ("llama-8b", 100), *((name, 90) for name in MODELS)]
)
def test_the_kernels_of_a_model_fit(name: str, arch: int) -> None:
    model = MODELS[name]
    x, weight, table = meta(TOKENS, model.hidden), meta(model.hidden), meta(1000, model.hidden)

    def launch() -> None:
        layers.rms_norm(x, weight, EPS)
        layers.add_rms_norm(x, meta(TOKENS, model.hidden), weight, EPS)
        layers.embedding(meta(TOKENS, dtype=torch.int64), table)
        layers.gated(meta(TOKENS, 2 * model.inner), "silu")
        layers.gated(meta(TOKENS, 2 * model.inner), "gelu_tanh")
        layers.rms_norm(x, meta(model.hidden, dtype=torch.float32), EPS, out=x)
        layers.add(x, x, scale=0.22)
        layers.scale(x, 12.0)
        layers.scale_by_position(
            x, meta(TOKENS, dtype=torch.int64), meta(4096, dtype=torch.float32)
        )
        layers.finish_logits(meta(TOKENS, 128256), divisor=8.0, cap=30.0)
        rope_write_kv(model, fp8=False)
        if arch > 80:
            rope_write_kv(model, fp8=True)

    for report in compile_launches(launch, arch=arch):
        report.assert_fits(arch)
        # What one thread holds must leave room for enough threads to keep the memory busy.
        assert report.registers <= 80, report
        # Shared memory here would mean that threads exchange what they have loaded.
        assert report.kernel != "_rope_write_kv" or report.shared == 0, report


def test_a_layer_without_rotation_fits() -> None:
    """SmolLM3's. Into an fp8 cache threads exchange a head, which is wider than the halves of others."""
    model = Model(2048, 11008, heads=16, kv_heads=4, rotary_dim=0)
    plain, fp8 = (
        compile_launches(lambda fp8=fp8: rope_write_kv(model, fp8=fp8))[0] for fp8 in (False, True)
    )
    plain.assert_fits(90)
    fp8.assert_fits(90)
    assert plain.shared == 0, plain


def test_an_fp8_cache_needs_hopper() -> None:
    with pytest.raises(CompileFailed, match="fp8e4nv not supported"):
        compile_launches(lambda: rope_write_kv(MODELS["llama-8b"], fp8=True), arch=80)


def test_a_lone_token_compiles_nothing_anew() -> None:
    """PyTorch may give the only row any stride; the code, and so the order of sums, is the same."""

    def launch() -> None:
        for x in (meta(2, 1000), meta(1, 1000), meta(1000, 1).t()):
            layers.rms_norm(x, meta(1000), EPS)

    assert len(set(compile_launches(launch))) == 1
