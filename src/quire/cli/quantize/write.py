"""Rounds and writes a checkpoint, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from quire.cli.quantize.plan import Plan, Step, Stored
from quire.dtypes import DTYPES
from quire.errors import CheckpointError
from quire.kernels.codes import CodeFormat
from quire.quantization.rounding import quantize
from quire.weights.files import INDEX_FILE
from quire.weights.source import Checkpoint

SHARD_BYTES = 4 << 30
"""Of a file at most, but for a tensor that is larger."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def write_checkpoint(
    plan: Plan,
    checkpoint: Checkpoint,
    source: Path,
    target: Path,
    progress: Callable[[int], object],
) -> None:
    """Into the empty directory `target`, with the other files of `source`. config.json comes last: until
    then it is no model. progress: called with the bytes read of each tensor."""
    shards = _shards(plan.steps)
    names = [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ] if len(shards) > 1 else ["model.safetensors"]  # fmt: skip
    places = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, steps in zip(names, shards, strict=True):
            with (target / name).open("wb") as file:
                file.write(_header([stored for step in steps for stored in step.stored]))
                for step in steps:
                    for stored, tensor in zip(
                        step.stored, _compute(step, checkpoint, pool), strict=True
                    ):
                        assert tuple(tensor.shape) == stored.shape, stored
                        assert tensor.dtype is getattr(torch, stored.dtype), stored
                        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                        places[stored.name] = name
                    progress(step.source.num_bytes)
    checkpoint.check_unchanged()
    for path in source.iterdir():
        if (
            path.is_file()
            and path.suffix not in WEIGHTS
            and path.name not in (INDEX_FILE, "config.json")
        ):
            shutil.copyfile(path, target / path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": places}
        (target / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (target / "config.json").write_text(json.dumps(plan.config, indent=2), encoding="utf-8")


def _shards(steps: Sequence[Step]) -> list[list[Step]]:
    shards: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        added = sum(stored.num_bytes for stored in step.stored)
        if shards[-1] and size + added > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(step)
        size += added
    return shards


def _header(tensors: Sequence[Stored]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for stored in tensors:
        end = begin + stored.num_bytes
        fields[stored.name] = {
            "dtype": DTYPES[stored.dtype].safetensors,
            "shape": list(stored.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _compute(step: Step, checkpoint: Checkpoint, pool: ThreadPoolExecutor) -> list[Tensor]:
    """The tensors of `step.stored`."""
    info = step.source
    raw = torch.empty(info.num_bytes, dtype=torch.uint8)
    if info.num_bytes:
        checkpoint.read(info, 0, memoryview(raw.numpy()))
    tensor = raw.view(getattr(torch, info.dtype)).view(info.shape)
    form = step.form
    if form is None:
        return [tensor]
    codes, scale, zero = _quantize(tensor, form, pool)
    if not scale.isfinite().all():
        raise CheckpointError(
            f"tensor {info.name} in {info.file} has a weight that is NaN or infinite; download it again, or "
            f"leave it out with --ignore"
        )
    if form.float8:
        return [codes.view(torch.float8_e4m3fn), scale]
    found = [pack(codes, form.bits), scale, torch.tensor(info.shape)]
    return found if zero is None else [*found, pack(zero.T, form.bits).T]


def _quantize(
    tensor: Tensor, form: CodeFormat, pool: ThreadPoolExecutor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By several threads: `quantize` uses one."""
    parts = tensor.split(max(256, -(-len(tensor) // (2 * torch.get_num_threads()))))
    found = list(pool.map(lambda part: quantize(part, form), parts))
    zeros = [scales.offset for _, scales in found if scales.offset is not None]
    return (
        torch.cat([codes for codes, _ in found]),
        torch.cat([scales.scale for _, scales in found]),
        torch.cat(zeros) if zeros else None,
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """[N, K] uint8 of 4 or 8 bits, as words: [N, ceil(K * bits / 32)] int32. Code i of a word has the bits
    from bits * i on."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)
