"""GPTQ (Frantar et al. 2023) as AutoGPTQ and GPTQModel write it: 2, 3, 4 or 8 bits.

The first format ("gptq", or no name) stores each zero less one, modulo 2^bits; "gptq_v2" stores it as it is.
In a symmetric file zeros are not used, as in vLLM: some files of the first format have them without the one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quire.kernels.codes import CodeFormat
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
    scale_type,
)

REMEDY = "use a checkpoint of that kind"


def read_config(config: Mapping[str, object]) -> LinearMethod:
    """Raises `UnsupportedModelError` for other numbers of bits and other packings."""
    fields = Fields(config)
    layout = fields.get(str, "checkpoint_format", "format", default="gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise fields.bad("checkpoint_format", f"only gptq and gptq_v2 are supported; {REMEDY}")
    plain = Matrix(
        bits=fields.choice((2, 3, 4, 8), "bits"),
        group=fields.group_size("group_size", default=128),
        symmetric=fields.get(bool, "sym", default=True),
        act_order=fields.get(bool, "desc_act", default=False),
        zeros_less_one=layout == "gptq",
    )
    modules = fields.get(list, "modules_in_block_to_quantize", default=[])
    scheme = Gptq(
        plain,
        head=fields.get(bool, "lm_head", default=False),
        dynamic=_read_dynamic(fields, plain),
        modules=tuple(name for names in modules for name in (names if isinstance(names, list) else [names])),
        skipped=fields.names("modules_to_not_convert"),
    )  # fmt: skip
    fields.finish()
    return CheckpointMethod(scheme, read_entries(config))


def _read_dynamic(fields: Fields, plain: Matrix) -> tuple[Override, ...]:
    overrides = []
    for pattern, values in fields.get(dict, "dynamic", default={}).items():
        negative = pattern.startswith("-:")
        own = Fields(values or {}, prefix=f"quantization_config.dynamic[{pattern!r}].")
        try:
            compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise fields.bad("dynamic", f"{pattern!r} is no regular expression: {error}") from None
        matrix = replace(
            plain,
            bits=own.choice((2, 3, 4, 8), "bits", default=plain.bits),
            group=own.group_size("group_size", default=plain.group or -1),
            symmetric=own.get(bool, "sym", default=plain.symmetric),
            act_order=own.get(bool, "desc_act", default=plain.act_order),
        )
        own.finish()
        overrides.append(Override(compiled, None if negative else matrix))
    return tuple(overrides)


@dataclass(frozen=True, slots=True)
class Override:
    pattern: re.Pattern[str]
    matrix: Matrix | None
    """None: not quantized."""


@dataclass(frozen=True, slots=True)
class Matrix:
    bits: int
    group: int
    symmetric: bool
    act_order: bool
    zeros_less_one: bool

    def stored(self, entries: Entries) -> StoredMatrix:
        bits, middle = self.bits, 1 << self.bits - 1
        groups = Axis("K", 1, self.group) if self.group else ONE
        zeros = StoredTensor("qzeros", (groups, Axis("N", bits, 32)), ("int32",))
        index = StoredTensor("g_idx", (INPUTS,), ("int32",))
        if "g_idx" not in entries:
            index = None  # type: ignore[assignment]
        unused = [zeros] if self.symmetric and (not entries or "qzeros" in entries) else []
        if index is not None and not self.group:
            unused.append(index)
        return StoredMatrix(
            label=f"int{bits} g{self.group}" if self.group else f"int{bits}",
            form=CodeFormat(
                bits=4 if bits <= 4 else 8,
                group=self.group,
                scale=scale_type(entries, "scales", default="float16"),
                offset="none" if self.symmetric else "zero",
                zero=middle if self.symmetric else 0,
                reordered=self.act_order and index is not None and self.group > 0,
            ),
            packing="columns",
            bits=bits,
            codes=StoredTensor("qweight", (Axis("K", bits, 32), OUTPUTS), ("int32",)),
            scale=StoredTensor("scales", (groups, OUTPUTS)),
            zero=None if self.symmetric else zeros,
            zero_added=1 if self.zeros_less_one else 0,
            group_index=index if self.group else None,
            unused=tuple(unused),
        )


@dataclass(frozen=True, slots=True)
class Gptq:
    plain: Matrix
    head: bool
    dynamic: tuple[Override, ...]
    modules: tuple[str, ...]
    """Ends of names; empty for all."""
    skipped: tuple[str, ...]

    def quantizes(self, name: str) -> bool:
        override = self._override(name)
        if override is not None and override.matrix is None:
            return False
        if ".layers." not in name:
            return self.head and name == "lm_head"
        listed = not self.modules or any(name.endswith("." + end) for end in self.modules)
        return listed and not is_listed(name, self.skipped)

    def matrix(self, name: str, entries: Entries) -> StoredMatrix:
        override = self._override(name)
        return ((override and override.matrix) or self.plain).stored(entries)

    def _override(self, name: str) -> Override | None:
        return next((each for each in self.dynamic if each.pattern.match(name)), None)
