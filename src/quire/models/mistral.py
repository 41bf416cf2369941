"""Mistral 7B and Nemo: Llama with a sliding window in every layer and a head size of its own.

Source: Jiang et al. 2023 (Mistral 7B); `MistralConfig` in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quire.models.common import (
    read_layer_types,
    read_sizes,
    read_spec,
    read_window,
    stack,
    windows_of_layer_types,
)
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec


def resolve(config: Mapping[str, object], architecture: str) -> ModelSpec:
    """`sliding_window` null (v0.2 onward) means full attention; absent means the family's default, 4096."""
    reader = ConfigReader(config)
    sizes = read_sizes(reader, model_type="mistral", default_num_kv_heads=8)
    windows = _windows(reader, num_layers=sizes.num_layers)
    attention = (replace(sizes.attention, window=window) for window in windows)
    return read_spec(
        reader,
        sizes,
        architecture=architecture,
        layers=stack(attention, sizes.mlp),
        default_eos_token_ids=(2,),
    )


def _windows(reader: ConfigReader, *, num_layers: int) -> tuple[int | None, ...]:
    """One window for all layers.

    transformers ignores `layer_types` here, so we accept it only where it agrees.
    """
    window = read_window(reader, default=4096)
    windows = (window,) * num_layers
    layer_types = read_layer_types(reader, num_layers=num_layers)
    if layer_types is not None:
        asked = windows_of_layer_types(reader, layer_types, window=window)
        if asked != windows:
            raise reader.bad(
                "layer_types",
                "Mistral has one window for all layers, and this list disagrees with it",
            )
    return windows
