"""MiMo-7B: Qwen2, with layers for multi-token prediction beside the model (`quire.models.head_spec`).

Source: Xiaomi 2025 (MiMo technical report, 2505.07608); `configuration_mimo.py` in the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.models import qwen2
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """`attention_bias` is written and not read: q, k and v have a bias, as in Qwen2."""
    reader = ConfigReader(config)
    if reader.text("model_type", default="mimo") != "mimo":
        raise reader.bad("model_type", "this architecture is only known with model_type 'mimo'")
    count = reader.integer("num_nextn_predict_layers", default=0, at_least=0)
    reader.raw("attention_bias")
    rest = {field: value for field, value in config.items() if not reader.was_read(field)}
    return replace(qwen2.resolve(rest, architecture), num_draft_layers=count)
