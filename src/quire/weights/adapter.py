"""LoRA adapters on disk (Hu et al. 2021), as PEFT writes them: everything that can be checked without torch
and without reading a tensor.

The tensors say what an adapter is: which matrices it changes, and the rank of each. From
adapter_config.json come only the scales and what changes the meaning of the tensors. No pattern in it is
ever run as a regular expression.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quire.quantization.base import LinearPart, LinearShape
from quire.weights.source import TensorInfo

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
MOST_CONFIG_BYTES = 1 << 20
HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"
PANEL = 64
"""Outputs that are computed together; B is held in panels of as many."""


class AdaptedModel(Protocol):
    """What is used of a `ModelSpec`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def has_head(self) -> bool: ...
    def linears(self) -> Iterator[LinearShape]: ...


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """y = g * (W x + scale * B (A x)) + bias, for one matrix W [outputs, inputs]. Of an embedding, x is a
    token as a vector with a single one."""

    site: int
    """The product, as `sites` numbers them, and the first of its outputs."""
    first: int
    name: str
    """Of W in our models: "model.layers.0.self_attn.q_proj"."""
    inputs: int
    outputs: int
    rank: int
    scale: float
    """alpha / rank, or alpha / sqrt(rank)."""
    a: TensorInfo
    """[rank, inputs]"""
    b: TensorInfo
    """[outputs, rank]"""
    magnitude: TensorInfo | None = None
    """[outputs]: DoRA's m (Liu et al. 2024), g = m / ||W + scale * B A||; None: g = 1."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that fits the model. Its tensors have not been read: they may still hold NaN."""

    content_hash: str
    """32 hexadecimal digits: of config and tensors."""
    matrices: tuple[AdaptedMatrix, ...]
    """In the model's order; at least one."""
    base_model: str | None
    """`base_model_name_or_path`: what the author called the base model. Often wrong, so only for lists."""

    @property
    def max_rank(self) -> int:
        return max(matrix.rank for matrix in self.matrices)

    def num_bytes(self, dtype_bytes: int) -> int:
        """Memory it takes when loaded: an upper bound, exact to a panel. dtype_bytes: of the model's
        dtype."""
        return sum(
            matrix_bytes(m.inputs, m.outputs, m.rank, dtype_bytes, m.magnitude is not None)
            for m in self.matrices
        )

    def key(self, name: str) -> str:
        """The adapter's name in `Placement.adapter`: NAME@HASH."""
        return f"{name}@{self.content_hash}"


def check_adapter(directory: Path, model: AdaptedModel, *, max_rank: int) -> AdapterInfo:
    """Reads the config, the header of the tensors, and all bytes once, for the hash.

    Raises:
        CheckpointError: a file is missing, truncated, too large or not what it should be; a tensor is not
        one of
            the model's, lacks its other half, or has a wrong shape or dtype.
        UnsupportedModelError: the adapter uses something that is not served, by its name in the config; or a
            rank is above `max_rank`.
    """
    raise NotImplementedError


def sites(model: AdaptedModel) -> list[LinearShape]:
    """The products that an adapter may change, in the order in which a forward pass calls `Ops.linear`;
    then the head; then the embedding, as a product with the vocabulary as inputs. A site's number is its
    index."""
    layers = [shape for shape in model.linears() if shape.parts[0].name.startswith("model.layers.")]
    head = LinearShape(model.hidden_size, (LinearPart(HEAD, model.vocab_size),), bias=False)
    embedding = LinearShape(
        model.vocab_size, (LinearPart(EMBEDDING, model.hidden_size),), bias=False
    )
    return [*layers, head, embedding]


def matrix_bytes(inputs: int, outputs: int, rank: int, dtype_bytes: int, scaled: bool) -> int:
    """Bytes of A, B and g in memory. B's outputs are in panels, at most one more than needed."""
    columns = (-(-outputs // PANEL) + 1) * PANEL
    return rank * (inputs + columns) * dtype_bytes + (4 * columns if scaled else 0)


def largest_adapter_bytes(model: AdaptedModel, max_rank: int, dtype_bytes: int) -> int:
    """Memory of an adapter with `max_rank` for every matrix of the layers: for a ledger at start."""
    return sum(
        matrix_bytes(shape.in_features, part.out_features, max_rank, dtype_bytes, True)
        for shape in sites(model)[:-2]
        for part in shape.parts
    )
