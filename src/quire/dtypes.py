"""The element types of tensors: one table for the package. No torch is needed, but names are PyTorch's:
`getattr(torch, name)` is the type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class DType(NamedTuple):
    bits: int
    """Bits of one element."""
    safetensors: str
    """Name in safetensors files."""
    c_code: int | None = None
    """enum dtype in kernels/cpu/vec.h; None if the C kernels do not compute in it."""


DTYPES: Mapping[str, DType] = {
    "float32": DType(32, "F32", 0),
    "bfloat16": DType(16, "BF16", 1),
    "float16": DType(16, "F16", 2),
    "float64": DType(64, "F64"),
    "float8_e4m3fn": DType(8, "F8_E4M3"),
    "float8_e5m2": DType(8, "F8_E5M2"),
    "float8_e8m0fnu": DType(8, "F8_E8M0"),
    "float6_e2m3": DType(6, "F6_E2M3"),
    "float6_e3m2": DType(6, "F6_E3M2"),
    "float4_e2m1": DType(4, "F4"),
    "complex64": DType(64, "C64"),
    "bool": DType(8, "BOOL"),
    "uint8": DType(8, "U8"),
    "uint16": DType(16, "U16"),
    "uint32": DType(32, "U32"),
    "uint64": DType(64, "U64"),
    "int8": DType(8, "I8"),
    "int16": DType(16, "I16"),
    "int32": DType(32, "I32"),
    "int64": DType(64, "I64"),
}

BY_SAFETENSORS: Mapping[str, str] = {dtype.safetensors: name for name, dtype in DTYPES.items()}
"""Name in a safetensors file -> name."""

FLOATS = ("bfloat16", "float16", "float32")
"""The dtypes in which a model computes, and in which its unquantized tensors are stored."""

FLOAT_SPELLINGS: Mapping[str, str] = {
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
"""Names that users may give."""


def element_bytes(name: str) -> int:
    """Of a type whose elements are whole bytes."""
    return DTYPES[name].bits // 8
