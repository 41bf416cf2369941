"""Building a model and filling it: the one call between its source and a model that can run.

It lives here and not in `quire.weights` because models may import weights and not the other way round.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch

from quire.attention.base import AttentionBackend
from quire.dtypes import FLOATS
from quire.errors import ConfigError
from quire.kernels.base import LayerKernels
from quire.kernels.group import Channels, Group
from quire.kv_layout import KVLayout
from quire.models.decoder import DecoderModel
from quire.models.head_spec import draft_tensors
from quire.models.spec import ModelSpec
from quire.models.stages import of_stage
from quire.quantization.matrix import QuantizedMethod
from quire.quantization.unquantized import UNQUANTIZED
from quire.weights.load import load_random_weights, load_weights
from quire.weights.names import EMBEDDING, HEAD, list_names
from quire.weights.source import ModelSource, TensorInfo

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "dummy"]


@torch.inference_mode()
def load_model(
    spec: ModelSpec,
    source: ModelSource | None,
    *,
    dtype: torch.dtype,
    kernels: LayerKernels,
    load_format: LoadFormat = "auto",
    max_model_len: int,
    attention: AttentionBackend | None = None,
    layout: KVLayout | None = None,
    group: Group | None = None,
    channels: Channels | None = None,
    seed: int = 0,
) -> DecoderModel:
    """A `DecoderModel` ready for `forward`. group, channels: as for `DecoderModel`; a part reads only its own
    rows and layers.

    "auto" is "safetensors"; "dummy" takes random weights from `seed` and reads no file
    (`source` may be None).

    Raises:
        CheckpointError: a tensor or file is missing, unexpected, truncated, or of the wrong shape or dtype.
        ConfigError: a dtype or load format that does not exist.
    """
    if str(dtype).removeprefix("torch.") not in FLOATS:
        raise ConfigError(
            f"dtype is {dtype}, but models run in bfloat16, float16 or float32; set --dtype"
        )
    if load_format not in ("auto", "safetensors", "dummy"):
        raise ConfigError(f"load_format is {load_format!r}; use auto, safetensors or dummy")
    started = time.perf_counter()
    model = DecoderModel(
        spec,
        dtype=dtype,
        kernels=kernels,
        max_model_len=max_model_len,
        attention=attention,
        layout=layout,
        group=group,
        channels=channels,
    )
    if load_format == "dummy":
        load_random_weights(model.targets(), dtype=dtype, seed=seed)
    else:
        if source is None:
            raise ConfigError(
                f"load_format {load_format!r} needs a model directory; name one or use dummy"
            )
        tied = {f"{EMBEDDING}.weight": HEAD} if spec.tie_word_embeddings else {}
        with source.open() as checkpoint:
            selected = of_stage(_without_drafts(checkpoint.tensors, spec), spec)
            load_weights(model.targets(), checkpoint, dtype=dtype, tied=tied, selected=selected)
    model.bind()
    seconds = time.perf_counter() - started
    logger.info(
        "loaded %s (%.1f M parameters) in %.2f s",
        spec.architecture,
        spec.num_parameters() / 1e6,
        seconds,
    )
    if isinstance(spec.quantization, QuantizedMethod):
        logger.info("%s", _describe(spec, spec.quantization, dtype))
    return model


def _without_drafts(tensors: Mapping[str, TensorInfo], spec: ModelSpec) -> Mapping[str, TensorInfo]:
    """Without those of layers for multi-token prediction, which `load_head` loads."""
    pattern = draft_tensors(spec)
    if pattern is None or not (drafts := [name for name in tensors if pattern.search(name)]):
        return tensors
    logger.info(
        "left out %s: layers that draft, for method mtp of speculative_config", list_names(drafts)
    )
    return {name: info for name, info in tensors.items() if name not in drafts}


def _describe(spec: ModelSpec, method: QuantizedMethod, dtype: torch.dtype) -> str:
    """ "196 of 197 linears int4 g128, 0.61 GB (bfloat16 2.20)" """
    formats = [method.format_of(part.name) for linear in spec.linears() for part in linear.parts]
    labels = Counter("" if form is None else form.label for form in formats)
    kinds = [
        f"{count} of {len(formats)} linears {label}"
        for label, count in labels.most_common()
        if label
    ]
    plain = dataclasses.replace(spec, quantization=UNQUANTIZED)
    held, full = (each.weight_bytes(dtype.itemsize) / 1e9 for each in (spec, plain))
    kind = str(dtype).removeprefix("torch.")
    return f"{', '.join(kinds) or 'no linear quantized'}, {held:.2f} GB ({kind} {full:.2f})"
