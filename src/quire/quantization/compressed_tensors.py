"""compressed-tensors, which llm-compressor writes: https://github.com/vllm-project/compressed-tensors.

A config has groups of layers, each with its own numbers of bits, scales and packing. Integers are packed to
words ("pack-quantized") or bytes; floats have 8 bits, or 4 with scales of 8 bits (MXFP4 and MXFP8 of the Open
Compute Project, NVFP4). Inputs are rounded to int8 where a group says so; floats of 8 bits for them are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quire.errors import UnsupportedModelError
from quire.kernels.codes import CodeFormat
from quire.quantization.base import LinearMethod
from quire.quantization.checkpoint import CheckpointMethod, read_entries
from quire.quantization.fields import Fields
from quire.quantization.fp8 import INPUT_SCALES, Block, read_block, stored_float8
from quire.quantization.stored import (
    E2M1,
    INPUTS,
    ONE,
    OUTPUTS,
    Axis,
    Entries,
    StoredMatrix,
    StoredTensor,
    scalar,
    scalars,
    scale_type,
)

PACKED, BYTES, FLOAT8 = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
FORMATS = (PACKED, BYTES, FLOAT8, "naive-quantized", NVFP4, MXFP4, MXFP8)
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
NO_WEIGHTS = ("dense", "mixed-precision")
"""Formats of a whole config that say nothing about a group."""


def read_config(config: Mapping[str, object]) -> LinearMethod:
    """Raises `UnsupportedModelError` for sparse weights, transforms and other formats."""
    fields = Fields(config)
    whole = fields.get(str, "format", default="mixed-precision")
    sparsity = fields.get(dict, "sparsity_config", default={})
    if sparsity.get("format", "dense") != "dense":
        raise fields.bad(
            "sparsity_config", "sparse weights are not supported; use a dense checkpoint"
        )
    if fields.get(dict, "transform_config", default={}).get("config_groups"):
        raise fields.bad("transform_config", "transforms are not supported; use another checkpoint")
    groups = []
    for name, group in fields.get(dict, "config_groups", default={}).items():
        if not isinstance(group, dict):
            raise fields.bad("config_groups", f"{name} must be an object")
        groups.append(_read_group(Fields(group, prefix=f"{name}."), whole))
    scheme = CompressedTensors(tuple(groups), fields.names("ignore"))
    fields.raw("kv_cache_scheme")
    fields.finish()
    return CheckpointMethod(scheme, read_entries(config))


def _read_group(fields: Fields, whole: str) -> Group:
    targets = fields.names("targets")
    layout = fields.get(str, "format", default=whole)
    weights = fields.get(dict, "weights", default={})
    inputs = fields.get(dict, "input_activations", default={})
    if not weights:
        return Group(targets, None)
    own = Fields(weights, prefix="weights.")
    kind = own.choice(("int", "float"), "type", default="int")
    bits = own.choice((1, 2, 3, 4, 5, 6, 7, 8), "num_bits", default=8)
    strategy = own.choice(STRATEGIES, "strategy", default="tensor")
    if layout in NO_WEIGHTS or layout == "naive-quantized":
        layout = FLOAT8 if kind == "float" else BYTES if layout == "naive-quantized" else PACKED
    if layout not in FORMATS:
        raise fields.bad("format", f"only {', '.join(FORMATS)} are supported", value=layout)
    if layout == FLOAT8 and (kind, bits) != ("float", 8):
        raise own.bad("num_bits", f"a group of {layout} has floats of 8 bits")
    block = own.raw("block_structure")
    return Group(
        targets,
        Weights(
            layout=layout,  # type: ignore[arg-type]
            bits=bits,
            symmetric=own.get(bool, "symmetric", default=True),
            strategy=strategy,
            group=own.group_size("group_size", default=128) if "group" in strategy else 0,
            block=read_block(own, "block_structure", block) if strategy == "block" else None,
            int8_inputs=inputs.get("type", "int") == "int"
            and inputs.get("num_bits") == 8
            and inputs.get("symmetric", True) is True,
        ),
    )


@dataclass(frozen=True, slots=True)
class Group:
    targets: tuple[str, ...]
    """A class of layers ("Linear"), a name, or "re:" and a regular expression."""
    weights: Weights | None

    def rank(self, name: str) -> int:
        """How closely it names a matrix: 0 not at all."""
        return max((_match(target, name) for target in self.targets), default=0)


def _match(target: str, name: str) -> int:
    if target.startswith("re:"):
        try:
            return 2 if re.match(target[3:], name) else 0
        except re.error as error:
            raise UnsupportedModelError(
                f"config.json: quantization_config has the target {target!r}, which is no regular "
                f"expression: {error}; correct the file"
            ) from None
    if target == "Linear":
        return 0 if name == "model.embed_tokens" else 1
    return 3 if target in (name, name.removeprefix("model.")) else 0


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def quantizes(self, name: str) -> bool:
        return (
            not any(_match(each, name) for each in self.ignore) and self._weights(name) is not None
        )

    def matrix(self, name: str, entries: Entries) -> StoredMatrix:
        weights = self._weights(name)
        if weights is None:
            raise UnsupportedModelError(
                f"{name} is quantized in the checkpoint ({', '.join(sorted(entries))}), but no group of "
                "config.json's quantization_config has it as a target; the file and its config are of "
                "different models"
            )
        return weights.stored(entries)

    def _weights(self, name: str) -> Weights | None:
        best = max(self.groups, key=lambda group: group.rank(name), default=None)
        return best.weights if best is not None and best.rank(name) else None


@dataclass(frozen=True, slots=True)
class Weights:
    layout: str
    bits: int
    symmetric: bool
    strategy: str
    group: int
    block: Block | None
    int8_inputs: bool

    def stored(self, entries: Entries) -> StoredMatrix:
        if self.layout == FLOAT8:
            kind = "channel" if self.strategy == "group" else self.strategy
            return stored_float8(
                scale_suffix="weight_scale", kind=kind, block=self.block, entries=entries
            )
        if self.layout == MXFP8:
            return stored_mx(entries, bits=8)
        if self.layout == MXFP4:
            return stored_mx(entries, bits=4)
        if self.layout == NVFP4:
            return stored_nvfp4(
                entries, codes="weight_packed", all_scale="weight_global_scale", divides=True
            )
        return self._integers(entries)

    def _integers(self, entries: Entries) -> StoredMatrix:
        packed, middle = self.layout == PACKED, 1 << self.bits - 1
        groups = Axis("K", 1, self.group, exact=True) if self.group else ONE
        scale = StoredTensor("weight_scale", (OUTPUTS, groups))
        if self.strategy == "tensor":
            scale = scalar(entries, "weight_scale")
        elif self.strategy == "block":
            raise UnsupportedModelError(
                "config.json: quantization_config has blocks of integers, which are not supported; use groups"
            )
        zero = StoredTensor("weight_zero_point", (Axis("N", self.bits, 32), groups), ("int32",))
        codes = StoredTensor("weight_packed", (OUTPUTS, Axis("K", self.bits, 32)), ("int32",))
        if not packed:
            codes = StoredTensor("weight", (OUTPUTS, INPUTS), ("int8",))
            zero, middle = StoredTensor("weight_zero_point", scale.axes, ("int8",)), 128
        index = StoredTensor("weight_g_idx", (INPUTS,), ("int32",))
        has_index = "weight_g_idx" in entries and self.group > 0
        has_shape = "weight_shape" in entries
        return StoredMatrix(
            label=f"int{self.bits}"
            + (f" g{self.group}" if self.group else "")
            + (" with int8 inputs" if self.int8_inputs else ""),
            form=CodeFormat(
                bits=4 if packed and self.bits <= 4 else 8,
                group=self.group,
                scale=scale_type(entries, "weight_scale", default="bfloat16"),
                offset="none" if self.symmetric else "zero",
                zero=middle if self.symmetric else 0,
                activation_bits=8 if self.int8_inputs else 16,
                reordered=has_index,
            ),
            packing="rows" if packed else "int8",
            bits=self.bits if packed else 8,
            codes=codes,
            scale=scale,
            zero=None if self.symmetric else zero,
            group_index=index if has_index else None,
            shape=StoredTensor("weight_shape", (Axis("1", 2),), ("int64", "int32")) if has_shape else None,
            unused=scalars(entries, *INPUT_SCALES),
        )  # fmt: skip


def stored_mx(entries: Entries, *, bits: Literal[4, 8]) -> StoredMatrix:
    """Groups of 32 floats, whose scales are powers of two in bytes. In bfloat16 they are exact."""
    scale = StoredTensor(
        "weight_scale", (OUTPUTS, Axis("K", 1, 32, exact=True)), ("uint8", "float8_e8m0fnu")
    )
    if bits == 8:
        codes = StoredTensor("weight", (OUTPUTS, INPUTS), ("float8_e4m3fn",))
        form = CodeFormat(bits=8, group=32, scale="bfloat16", float8=True)
        return StoredMatrix("mxfp8", form, "float8", 8, codes, scale)
    codes = StoredTensor("weight_packed", (OUTPUTS, Axis("K", 1, 2, exact=True)), ("uint8",))
    form = CodeFormat(bits=4, group=32, scale="bfloat16", values=E2M1)
    return StoredMatrix("mxfp4", form, "rows", 4, codes, scale, factor=0.5)


def stored_nvfp4(entries: Entries, *, codes: str, all_scale: str, divides: bool) -> StoredMatrix:
    """Groups of 16 floats of 4 bits; scales in E4M3, times or divided by one scale of the matrix."""
    axis = Axis("K", 1, 16, exact=True)
    return StoredMatrix(
        label="nvfp4",
        form=CodeFormat(bits=4, group=16, values=E2M1),
        packing="rows",
        bits=4,
        codes=StoredTensor(codes, (OUTPUTS, Axis("K", 1, 2, exact=True)), ("uint8",)),
        scale=StoredTensor("weight_scale", (OUTPUTS, axis), ("float8_e4m3fn",)),
        factor=0.5,
        all_scale=scalar(entries, all_scale),
        all_divides=divides,
        unused=scalars(entries, *INPUT_SCALES, "input_global_scale"),
    )
