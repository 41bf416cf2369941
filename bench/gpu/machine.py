"""What the machine is, and its two ceilings: how fast it copies and multiplies."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from bench.gpu.lab import DEVICE, randn, seconds
from bench.gpu.suite import Case, Entry, Options, Values


def cases(options: Options, entries: Sequence[Entry]) -> list[Case]:
    small = options.sizes == "smoke"
    return [
        Case("ceilings", lambda: ceilings(1 << 20 if small else 1 << 31, 64 if small else 8192)),
        Case("facts", facts),
    ]


def ceilings(elements: int, size: int) -> Values:
    """A device-to-device copy in bf16, bytes read and written; a square bf16 product of random numbers."""
    source = torch.empty(elements, dtype=torch.bfloat16, device=DEVICE).uniform_()
    target = torch.empty_like(source)
    a, b = randn(size, size), randn(size, size)
    return {
        "bytes_per_s": 4 * elements / seconds([lambda: target.copy_(source)]),
        "flops_per_s": 2 * size**3 / seconds([lambda: a @ b]),
    }


def facts() -> Values:
    found: Values = {
        "device": DEVICE.type,
        "cuda": torch.version.cuda,
        "fa3": importlib.util.find_spec("flash_attn_interface") is not None,
    }
    if DEVICE.type == "cuda":
        device = torch.cuda.get_device_properties(DEVICE)
        found |= {"device": device.name, "multiprocessors": device.multi_processor_count}
        found |= {"memory_gib": device.total_memory / 2**30, "l2_mib": device.L2_cache_size / 2**20}
    return found
