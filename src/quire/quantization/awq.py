"""AWQ (Lin et al. 2024) as AutoAWQ packs it for "gemm": 4 bits, groups along the inputs, with zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quire.errors import UnsupportedModelError
from quire.kernels.codes import CodeFormat
from quire.quantization.base import LinearMethod
from quire.quantization.checkpoint import CheckpointMethod, read_entries
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

WORDS = Axis("N", 1, 8, exact=True)


def read_config(config: Mapping[str, object]) -> LinearMethod:
    """Raises `UnsupportedModelError` for other numbers of bits and other packings."""
    fields = Fields(config)
    fields.choice((4,), "bits", "w_bit")
    version = fields.get(str, "version", default="gemm").lower()
    if version != "gemm":
        raise fields.bad("version", 'only the packing "gemm" is supported; use a checkpoint of it')
    scheme = Awq(
        group=fields.group_size("group_size", "q_group_size", default=128),
        zero_point=fields.get(bool, "zero_point", default=True),
        skipped=fields.names("modules_to_not_convert"),
    )
    fields.raw("sym")  # AutoRound's word for no zero_point
    fields.finish()
    return CheckpointMethod(scheme, read_entries(config))


@dataclass(frozen=True, slots=True)
class Awq:
    group: int
    zero_point: bool
    skipped: tuple[str, ...]
    """Parts of names."""

    def quantizes(self, name: str) -> bool:
        return ".layers." in name and not any(part in name for part in self.skipped)

    def matrix(self, name: str, entries: Entries) -> StoredMatrix:
        packed = entries.get("qweight")
        if packed is not None and packed.dtype == "int16":
            raise UnsupportedModelError(
                f"tensor {name}.qweight has 16-bit words, as in AWQ's packings for gemv; only the packing "
                '"gemm" of AutoAWQ is supported: use a checkpoint of it'
            )
        # A file may have zeros although its config says that there are none: they are 8 then.
        has_zeros = "qzeros" in entries if entries and not self.zero_point else self.zero_point
        groups = Axis("K", 1, self.group, exact=True) if self.group else ONE
        return StoredMatrix(
            label=f"int4 g{self.group}" if self.group else "int4",
            form=CodeFormat(
                bits=4,
                group=self.group,
                scale=scale_type(entries, "scales", default="float16"),
                offset="zero" if has_zeros else "none",
                zero=0 if has_zeros else 8,
            ),
            packing="awq",
            bits=4,
            codes=StoredTensor("qweight", (INPUTS, WORDS), ("int32",)),
            scale=StoredTensor("scales", (groups, OUTPUTS)),
            zero=StoredTensor("qzeros", (groups, WORDS), ("int32",)) if has_zeros else None,
        )
