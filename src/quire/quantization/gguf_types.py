"""The types of GGUF's tensors, and the sizes of their blocks: see `quire.quantization.gguf`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from quire.dtypes import element_bytes


class Block(NamedTuple):
    elements: int
    bytes: int


BLOCKS: Mapping[str, Block] = {
    **{
        name: Block(1, element_bytes(name))
        for name in ("float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64")
    },
    "q4_0": Block(32, 18), "q4_1": Block(32, 20), "q5_0": Block(32, 22), "q5_1": Block(32, 24),
    "q8_0": Block(32, 34), "q8_1": Block(32, 40), "q2_K": Block(256, 84), "q3_K": Block(256, 110),
    "q4_K": Block(256, 144), "q5_K": Block(256, 176), "q6_K": Block(256, 210),
    "q8_K": Block(256, 292), "iq2_xxs": Block(256, 66), "iq2_xs": Block(256, 74),
    "iq3_xxs": Block(256, 98), "iq1_s": Block(256, 50), "iq4_nl": Block(32, 18),
    "iq3_s": Block(256, 110), "iq2_s": Block(256, 82), "iq4_xs": Block(256, 136),
    "iq1_m": Block(256, 56), "tq1_0": Block(256, 54), "tq2_0": Block(256, 66),
    "mxfp4": Block(32, 17), "nvfp4": Block(64, 36),
}  # fmt: skip
"""All types that a file may have."""
