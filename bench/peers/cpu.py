"""What this processor is, where that decides how a rival is best used."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from bench.peers.workloads import ModelShape


@cache
def _cpuinfo() -> str:
    """The first processor's part of /proc/cpuinfo; empty on another system than Linux."""
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return ""


def flags() -> frozenset[str]:
    """Its features by the kernel's names, such as `avx512_bf16`."""
    line = next((line for line in _cpuinfo().splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def has_bf16() -> bool:
    """Whether it multiplies bf16. Where not, weights in bf16 are converted to float32 at each use."""
    return bool(flags() & {"avx512_bf16", "amx_bf16"})


def compute_dtype() -> str:
    """What vLLM, OpenVINO and transformers compute in: torch's name of it."""
    return "bfloat16" if has_bf16() else "float32"


def gguf_dtype() -> str:
    """The type of llama.cpp's model file: without bf16, f16 is the fastest of the three to decode with."""
    return "bf16" if has_bf16() else "f16"


def kv_cache_bytes(model: ModelShape, dtype: str) -> int:
    """Room for as many tokens in `dtype` as the others have in bf16."""
    return model.kv_cache_bytes * (2 if dtype == "float32" else 1)


def is_zen4() -> bool:
    """AMD with AVX-512: where vLLM uses zentorch."""
    return "AuthenticAMD" in _cpuinfo() and "avx512f" in flags()
