"""FP8 and NVFP4 as NVIDIA's Model Optimizer writes them, in hf_quant_config.json or in config.json."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from quire.quantization.base import LinearMethod
from quire.quantization.checkpoint import CheckpointMethod, read_entries
from quire.quantization.compressed_tensors import stored_nvfp4
from quire.quantization.fields import Fields
from quire.quantization.fp8 import kind_of, stored_float8
from quire.quantization.stored import Entries, StoredMatrix


def read_config(config: Mapping[str, object]) -> LinearMethod:
    """Raises `UnsupportedModelError` for other algorithms."""
    fields = Fields(config)
    algorithm = fields.get(str, "quant_algo")
    if algorithm not in ("FP8", "NVFP4"):
        rule = "only FP8 and NVFP4 are supported; use a checkpoint in one of them"
        raise fields.bad("quant_algo", rule)
    if algorithm == "NVFP4":
        fields.choice((16,), "group_size", default=16)
    for name in ("kv_cache_quant_algo", "kv_cache_scheme", "config_groups"):
        fields.raw(name)
    skipped = (*fields.names("exclude_modules"), *fields.names("ignore"))
    fields.finish()
    return CheckpointMethod(ModelOpt(algorithm, skipped), read_entries(config))


@dataclass(frozen=True, slots=True)
class ModelOpt:
    algorithm: str
    skipped: tuple[str, ...]
    """Names, with * for any text."""

    def quantizes(self, name: str) -> bool:
        return ".layers." in name and not any(fnmatch.fnmatch(name, each) for each in self.skipped)

    def matrix(self, name: str, entries: Entries) -> StoredMatrix:
        if self.algorithm == "NVFP4":
            return stored_nvfp4(entries, codes="weight", all_scale="weight_scale_2", divides=False)
        kind = kind_of(entries.get("weight_scale")) if entries else "tensor"
        return stored_float8(scale_suffix="weight_scale", kind=kind, entries=entries)
