"""Floats of 8 bits (E4M3, Micikevicius et al. 2022): as Qwen, DeepSeek ("fp8") and FBGEMM write them.

A scale belongs to the matrix, to a row, or to a block of 128 x 128 weights, of which the last ones may be
smaller. Inputs are not rounded to 8 bits, so scales for them are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.kernels.codes import CodeFormat, ScaleType
from quire.quantization.base import LinearMethod
from quire.quantization.checkpoint import CheckpointMethod, is_listed, read_entries
from quire.quantization.fields import Fields
from quire.quantization.stored import (
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

Block = tuple[int, int]
"""Outputs and inputs that share a scale."""
INPUT_SCALES = ("input_scale", "input_scale_ub", "input_zero_point", "activation_scale")


def read_config(config: Mapping[str, object]) -> LinearMethod:
    """Raises `UnsupportedModelError` for E5M2, and for floats that are to be rounded when loaded."""
    fields = Fields(config)
    if fields.raw("quant_method") == "fbgemm_fp8":
        scheme = Fp8(skipped=fields.names("modules_to_not_convert"))
        fields.finish()
        return CheckpointMethod(scheme, read_entries(config))
    fields.choice(("e4m3", "float8_e4m3fn"), "fmt", default="e4m3")
    fields.choice(("dynamic", "static"), "activation_scheme", default="dynamic")
    fields.choice(("float", "ue8m0"), "scale_fmt", default="float")
    if not fields.get(bool, "is_checkpoint_fp8_serialized", default=True):
        raise fields.bad(
            "is_checkpoint_fp8_serialized",
            "the file is not quantized then; remove quantization_config, and use --quantization "
            "fp8_per_channel",
        )
    block = fields.get(list, "weight_block_size", default=[])
    scheme = Fp8(
        read_block(fields, "weight_block_size", block) if block else None,
        skipped=(*fields.names("ignored_layers"), *fields.names("modules_to_not_convert")),
    )
    fields.raw("kv_cache_scheme")
    fields.finish()
    return CheckpointMethod(scheme, read_entries(config))


def read_block(fields: Fields, name: str, block: object) -> Block:
    match block:
        case [int(outputs), int(inputs)] if outputs > 0 and inputs > 0 and inputs % 8 == 0:
            return outputs, inputs
    rule = "it must be two positive numbers, the second a multiple of 8"
    raise fields.bad(name, rule, value=block)


@dataclass(frozen=True, slots=True)
class Fp8:
    block: Block | None = None
    skipped: tuple[str, ...] = field(default=())

    def quantizes(self, name: str) -> bool:
        return ".layers." in name and not is_listed(name, self.skipped)

    def matrix(self, name: str, entries: Entries) -> StoredMatrix:
        scale = "weight_scale_inv" if self.block else "weight_scale"
        if self.block is None and not entries:
            return stored_float8(scale_suffix=scale, kind="channel", entries=entries)
        kind = "block" if self.block else kind_of(entries.get(scale))
        return stored_float8(scale_suffix=scale, kind=kind, block=self.block, entries=entries)


def kind_of(scale: object) -> str:
    """From a scale's shape in the header."""
    shape = getattr(scale, "shape", None)
    return "tensor" if shape is not None and shape in ((), (1,)) else "channel"


def stored_float8(
    *, scale_suffix: str, kind: str, entries: Entries, block: Block | None = None
) -> StoredMatrix:
    """kind: "tensor", "channel" or "block"."""
    scale, label, group = scalar(entries, scale_suffix), "fp8", 0
    if kind == "channel":
        flat = scale_suffix in entries and len(entries[scale_suffix].shape) == 1
        scale = StoredTensor(scale_suffix, (OUTPUTS,) if flat else (OUTPUTS, ONE))
    elif kind == "block":
        assert block is not None
        axes, group = (Axis("N", 1, block[0]), Axis("K", 1, block[1])), block[1]
        scale = StoredTensor(scale_suffix, axes)
        label = f"fp8 {block[0]}x{block[1]}"
    # Powers of two may be stored as bytes; in bfloat16 they are exact.
    dtype = entries[scale_suffix].dtype if scale_suffix in entries else ""
    powers = dtype in ("float8_e8m0fnu", "uint8")
    if powers:
        scale = scale._replace(dtypes=(dtype,))
    default: ScaleType = "bfloat16" if powers else "float32"
    return StoredMatrix(
        label=label,
        form=CodeFormat(
            bits=8, group=group, float8=True, scale=scale_type(entries, scale_suffix, default=default)
        ),
        packing="float8",
        bits=8,
        codes=StoredTensor("weight", (OUTPUTS, INPUTS), ("float8_e4m3fn",)),
        scale=scale,
        unused=scalars(entries, *INPUT_SCALES),
    )  # fmt: skip
