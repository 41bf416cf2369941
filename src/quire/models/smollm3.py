"""SmolLM3: Llama whose every fourth layer does not rotate queries and keys (NoPE).

Source: Bakouch et al. 2025 (SmolLM3); Yang et al. 2025 (RoPE to NoRoPE and back again); `SmolLM3Config` in
transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.models.common import (
    FULL,
    SLIDING,
    read_layer_types,
    read_sizes,
    read_spec,
    read_window,
    stack,
    windows_of_layer_types,
)
from quire.models.fields import ConfigReader
from quire.models.rope_config import read_rope
from quire.models.spec import ModelSpec


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """With `use_sliding_window` and no `layer_types`, layers that do not rotate have the window."""
    reader = ConfigReader(config)
    sizes = read_sizes(reader, model_type="smollm3", default_num_kv_heads=4)
    bias = reader.boolean("attention_bias", default=False)
    attention = replace(sizes.attention, qkv_bias=bias, o_bias=bias)
    mlp = replace(sizes.mlp, bias=reader.boolean("mlp_bias", default=False))
    rotates = _rotates(reader, num_layers=sizes.num_layers)
    windows = _windows(reader, rotates)
    layers = [
        replace(attention, rope=0 if rotating else None, window=window)
        for rotating, window in zip(rotates, windows, strict=True)
    ]
    return read_spec(
        reader,
        sizes,
        architecture=architecture,
        layers=stack(layers, mlp),
        ropes=(read_rope(reader, sizes.rope_defaults(theta=2e6)),),
        default_tied=True,
        default_eos_token_ids=(128001,),
    )


def _rotates(reader: ConfigReader, *, num_layers: int) -> list[bool]:
    """From `no_rope_layers`, whose 1 means that the layer does rotate."""
    interval = reader.integer("no_rope_layer_interval", default=4)
    given = reader.raw("no_rope_layers")
    if given is None:
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    values = given if isinstance(given, list) else []
    if len(values) != num_layers or any(type(v) is not int or v not in (0, 1) for v in values):
        raise reader.bad("no_rope_layers", f"it must be a list of {num_layers} times 0 or 1")
    return [value == 1 for value in values]


def _windows(reader: ConfigReader, rotates: list[bool]) -> tuple[int | None, ...]:
    reader.raw("max_window_layers")  # written, and never read by transformers
    window = read_window(reader, default=None)
    if not reader.boolean("use_sliding_window", default=False):
        window = None
    layer_types = read_layer_types(reader, num_layers=len(rotates))
    if layer_types is None:
        layer_types = tuple(FULL if rotating or not window else SLIDING for rotating in rotates)
    return windows_of_layer_types(reader, layer_types, window=window)
