"""`LLM` on the device, through its whole start, against `LLM` on the CPU: as it is, with quantized matrices,
with drafts, with an adapter, and with the model divided between two GPUs.

The checkpoint is tiny and in float32, so that both choose the same greedy tokens.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench.gpu.lab import DEVICE
from bench.gpu.suite import Values

from quire.engine.llm import LLM
from quire.lora.request import LoRARequest
from quire.sampling_params import SamplingParams

Tokens = list[list[int]]
QUANTIZATIONS = ("int8", "int4", "fp8_per_channel")


@contextmanager
def _checkpoint(small: bool) -> Iterator[str]:
    from tests.engine.checkpoints import write_checkpoint

    sizes = {} if small else {"hidden_size": 256, "intermediate_size": 512}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint("qwen3", Path(folder), **sizes)
        yield folder


def _prompts(small: bool) -> Tokens:
    return [
        random.Random(n).choices(range(5, 300), k=n) for n in ((3, 20) if small else (1, 21, 90))
    ]


def _generate(
    folder: str, small: bool, device: str, lora: tuple[str, str] | None = None, **options: Any
) -> Tokens:
    options = {
        "dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64,
        "device": device, **options,
    }  # fmt: skip
    # On the GPU the memory is measured and planned, as at every start; beside others it gets half of it.
    options |= (
        {"kv_cache_memory_bytes": 1 << 24} if device == "cpu" else {"gpu_memory_utilization": 0.5}
    )
    how = SamplingParams(temperature=0.0, max_tokens=6 if small else 32, ignore_eos=True)
    request = None if lora is None else LoRARequest(lora[0], 1, lora[1])
    with LLM(folder, enable_lora=lora is not None, **options) as llm:
        prompts = [{"prompt_token_ids": ids} for ids in _prompts(small)]
        outputs = llm.generate(prompts, how, lora_request=request, use_tqdm=False)  # type: ignore[arg-type]
        return [list(output.outputs[0].token_ids) for output in outputs]


def _agreeing(mine: Tokens, theirs: Tokens) -> list[int]:
    """Tokens of each until they differ."""
    return [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(mine, theirs, strict=True)
    ]


def _same(mine: Tokens, theirs: Tokens) -> Values:
    return {"ok": mine == theirs, "of": len(theirs[0]), "agreeing": _agreeing(mine, theirs)}


def served(*, small: bool) -> Values:
    with _checkpoint(small) as folder:
        return _same(*(_generate(folder, small, of) for of in (DEVICE.type, "cpu")))


def quantized(*, small: bool) -> Values:
    """The CPU may round what a product reads as well, so first tokens must agree, of two prompts in three."""
    found: Values = {"of": 6 if small else 32}
    with _checkpoint(small) as folder:
        for name in QUANTIZATIONS:
            both = (_generate(folder, small, of, quantization=name) for of in (DEVICE.type, "cpu"))
            found[name] = _agreeing(*both)
    first = [agreeing > 0 for name in QUANTIZATIONS for agreeing in found[name]]
    return {"ok": 3 * sum(first) >= 2 * len(first), **found}


def speculative(*, small: bool) -> Values:
    """Drafts change no token."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with _checkpoint(small) as folder:
        mine = _generate(folder, small, DEVICE.type, speculative_config=drafts)
        return _same(mine, _generate(folder, small, DEVICE.type))


def adapter(*, small: bool) -> Values:
    """An adapter of every product; and that it changes anything."""
    from tests.weights.adapter_writer import write_adapter

    from quire.config import from_flat
    from quire.engine.setup import resolve

    with _checkpoint(small) as folder, tempfile.TemporaryDirectory() as other:
        spec = resolve(from_flat({"model": folder, "device": "cpu"})).spec
        lora = ("a", str(write_adapter(Path(other), spec, ["_proj"], rank=8, dtype=torch.float32)))
        mine, theirs = (_generate(folder, small, of, lora) for of in (DEVICE.type, "cpu"))
        plain = _generate(folder, small, "cpu")
    same = _same(mine, theirs)
    return same | {"ok": same["ok"] and plain != theirs, "changes": plain != theirs}


def ranks(*, small: bool) -> Values:
    """The model divided between two devices. Without a second one there is nothing to run."""
    if DEVICE.type == "cuda" and torch.cuda.device_count() < 2:
        return {"skipped": "one GPU"}
    with _checkpoint(small) as folder:
        mine = _generate(folder, small, DEVICE.type, tensor_parallel_size=2)
        return _same(mine, _generate(folder, small, "cpu"))
