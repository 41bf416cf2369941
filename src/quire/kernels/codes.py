"""Matrices of codes: how a quantized matrix is held and multiplied. Torch-free.

The formats of checkpoints (`quire.quantization`) differ in how they pack bits and name tensors. What they
mean is one formula, of output n and input k, with g the group of k:

    weight[n, k] = scale[n, g] * (value(code[n, k]) - zero[n, g])        or
    weight[n, k] = scale[n, g] * value(code[n, k]) + minimum[n, g]

computed in float32, from left to right as written. So a format translates its tensors to plain codes, one
unsigned byte each, and to scales, and kernels know nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

PANEL = 64
"""Rows of a matrix are held in panels of this number on a CPU. PANEL in kernels/cpu/linear_panel.h."""

ScaleType = Literal["float32", "float16", "bfloat16", "int8"]
SCALE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class CodeFormat:
    """What a matrix of codes is made of."""

    bits: Literal[4, 8]
    """Of a code in memory. A code of 2, 3, 5 or 6 bits takes the next larger size."""
    group: int = 0
    """Inputs that share a scale: a multiple of 8. 0: all inputs. The last group may have fewer."""
    scale: ScaleType = "float32"
    """The dtype of the stored scales. int8: they are multiplied by a super scale."""
    super_groups: int = 0
    """Groups that share a super scale in float16 (of GGUF's K types), if `scale` is int8; else 0. Then a
    scale is int8 * super scale, and a minimum is -(uint8 * super minimum)."""
    offset: Literal["none", "zero", "minimum"] = "none"
    """zero: a uint8 of each group. minimum: of the scales' dtype, or with super scales a uint8."""
    zero: int = 0
    """The zero of all groups, if `offset` is "none" or "minimum"."""
    values: tuple[int, ...] = ()
    """The values of the 16 codes of 4 bits, in [-128, 127]; empty: a code is its own value."""
    float8: bool = False
    """The codes are floats of 8 bits (E4M3, no infinities: `torch.float8_e4m3fn`)."""
    activation_bits: Literal[8, 16] = 16
    """Inputs are rounded to signed integers of so many bits: of 16 with a scale for each row and group, of 8
    with one for each row, and only if the checkpoint or the user asks for it. Float8 matrices multiply the
    inputs as they are."""
    reordered: bool = False
    """Groups are not of consecutive inputs: the product's `reorder` is called (GPTQ's desc_act)."""

    def __post_init__(self) -> None:
        assert self.group % 8 == 0, self
        assert (self.scale == "int8") == (self.super_groups > 0), self
        assert len(self.values) in (0, 16), self
        assert not self.float8 or (self.bits == 8 and self.offset == "none"), self

    def with_activations(self, bits: int) -> CodeFormat:
        """With inputs of at most so many bits: 8 or 16."""
        return replace(self, activation_bits=8) if bits == 8 else self

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group) if self.group else 1

    def num_supers(self, in_features: int) -> int:
        return -(-self.num_groups(in_features) // self.super_groups) if self.super_groups else 0

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """In memory, on a CPU."""
        scales = self.num_groups(in_features) * SCALE_BYTES[self.scale]
        if self.offset == "minimum":
            scales *= 2
        elif self.offset == "zero":
            scales += self.num_groups(in_features)
        supers = self.num_supers(in_features) * (4 if self.offset == "minimum" else 2)
        codes = -(-in_features // 8) * self.bits
        order = 4 * in_features if self.reordered else 0
        return -(-out_features // PANEL) * PANEL * (codes + scales + supers) + order
