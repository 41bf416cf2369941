"""Against the figures of the house's notes on the H200 (4.8 TB/s by the datasheet, 4.3 measured; 790
TFLOP/s), worked out there independently."""

from __future__ import annotations

import pytest
from bench.gpu.roofline import (
    ASSUMED,
    Ceilings,
    decode_s,
    measured,
    prefill_s,
    step_weights,
    workload_s,
)
from tests.models.published import LLAMA_3_1_8B, QWEN3_06B

from quire.models.registry import resolve_spec

SHEET, COPY = Ceilings(4.8e12, 790e12), Ceilings(4.3e12, 790e12)
LLAMA, QWEN = resolve_spec(LLAMA_3_1_8B), resolve_spec(QWEN3_06B)
QWEN_8B = resolve_spec({
    **QWEN3_06B, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 12288,
})  # fmt: skip


def near(value: float) -> object:
    return pytest.approx(value, rel=0.03)


def test_weights_of_a_step() -> None:
    assert 2 * step_weights(LLAMA) / 1e9 == near(15.0)
    assert 2 * step_weights(QWEN) / 1e9 == near(1.19)


@pytest.mark.parametrize(
    ("spec", "ceilings", "rates"),
    [
        (LLAMA, SHEET, {1: 317, 8: 2390, 64: 13_000, 256: 21_300}),
        (LLAMA, COPY, {1: 284, 8: 2140, 64: 11_700, 256: 19_900}),
        (QWEN, SHEET, {1: 3670, 8: 18_000, 64: 35_300, 256: 38_500}),
        (QWEN_8B, SHEET, {1: 314, 8: 2350, 64: 12_400, 256: 19_800}),
    ],
)
def test_decoding_at_a_thousand_tokens(
    spec: object, ceilings: Ceilings, rates: dict[int, float]
) -> None:
    for batch, rate in rates.items():
        assert batch / decode_s(spec, batch, batch * 1024, ceilings) == near(rate)  # type: ignore[arg-type]


def test_prompts() -> None:
    assert 1024 / prefill_s(LLAMA, [1024], SHEET) == near(55_500)
    assert 8192 / prefill_s(LLAMA, [8192], SHEET) == near(49_000)
    assert 1e3 * prefill_s(LLAMA, [8192], SHEET) == near(167)
    assert 1024 / prefill_s(QWEN, [1024], SHEET) == near(791_000)
    assert 1e3 * prefill_s(QWEN, [8192], SHEET) == near(19)
    together = prefill_s(LLAMA, [1024] * 8, SHEET)
    assert together == near(8 * prefill_s(LLAMA, [1024], SHEET))


def test_a_workload() -> None:
    assert workload_s(QWEN_8B, [(1024, 1024)] * 256, SHEET) == near(22.1)
    # What has not begun counts nothing, what was cut short counts what it did.
    half = workload_s(QWEN_8B, [(1024, 512)] * 256, SHEET)
    assert 0.4 * 22.1 < half < 0.6 * 22.1
    assert workload_s(QWEN_8B, [(1024, 512)] * 256 + [(900, 0)] * 9, SHEET) == half
    # Requests that end leave the others faster steps.
    assert workload_s(LLAMA, [(9, 64)] + [(9, 2)] * 99, SHEET) < workload_s(
        LLAMA, [(9, 64)] * 100, SHEET
    )


def test_an_fp8_cache_reads_half() -> None:
    whole, half = (decode_s(LLAMA, 256, 256 * 1024, SHEET, kv_bytes=size) for size in (2, 1))
    assert 1e3 * (whole - half) == near(3.6)


def test_ceilings_are_those_of_the_run() -> None:
    entry = {
        "part": "machine",
        "name": "ceilings",
        "status": "ok",
        "values": {"bytes_per_s": 1.0, "flops_per_s": 2.0},
    }
    assert measured([entry]) == Ceilings(1.0, 2.0)
    assert measured([entry | {"status": "failed"}]) == ASSUMED == measured([])
