"""Whole copies of what a draft head reads of a target that is divided among ranks: its embedding and output
head. They are read from the target's checkpoint, so logits and rows are those of one device, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

import torch

from quire.kernels.base import LayerKernels
from quire.kernels.ops import Head, LinearProduct
from quire.layers.eager import compute_logits
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.parameter import WeightTarget
from quire.models.head_spec import HeadSpec, draft_tensors
from quire.models.spec import ModelSpec
from quire.weights.load import load_random_weights, load_weights
from quire.weights.names import EMBEDDING, HEAD, TOWERS
from quire.weights.source import ModelSource, TensorInfo

_TOKENS = re.compile(r"(?:^|\.)(embed_tokens|lm_head)(\.[^.]+)$")
_NAMES = {"embed_tokens": EMBEDDING, "lm_head": "lm_head"}


class TokenMatrices:
    """Usable once every target has been loaded and `bind()` called."""

    def __init__(self, spec: HeadSpec, *, dtype: torch.dtype, kernels: LayerKernels) -> None:
        target = spec.target
        self._spec, self._kernels = target, kernels
        self._linears = {
            shape.parts[0].name: Linear(
                shape, dtype=dtype, method=target.quantization, kernels=kernels
            )
            for shape in spec.copied_linears
        }
        self._embedding: Embedding | None = None
        if spec.copies_rows:
            self._embedding = Embedding(
                EMBEDDING,
                vocab_size=target.vocab_size,
                hidden_size=target.hidden_size,
                dtype=dtype,
                device=kernels.device,
            )

    def targets(self) -> Iterator[WeightTarget]:
        for part in (*self._linears.values(), self._embedding):
            if part is not None:
                yield from part.targets()

    def bind(self) -> None:
        spec = self._spec
        products = {name: linear.bind() for name, linear in self._linears.items()}
        rows = None if self._embedding is None else self._embedding.weight
        self.embedded: LinearProduct | torch.Tensor | None = products.get(EMBEDDING, rows)
        """As `DecoderModel.embedded`; None if the draft head has its own."""
        product = products.get(spec.head.parts[0].name)
        self._head: Head | None = None
        if product is not None:
            self._head = Head(product, spec.logits_divisor, spec.logits_softcap)

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, hidden_size]. Returns [R, vocab_size] float32."""
        assert self._head is not None, "the draft head has its own output head"
        return compute_logits(self._kernels, self._head, hidden).float()


@torch.inference_mode()
def load_copies(
    spec: HeadSpec,
    source: ModelSource,
    *,
    dtype: torch.dtype,
    kernels: LayerKernels,
    random_seed: int | None = None,
) -> TokenMatrices:
    """source: of the target. random_seed: the random weights that the target has with this seed; no file is
    read. Raises `CheckpointError` as loading the target does."""
    copies = TokenMatrices(spec, dtype=dtype, kernels=kernels)
    modules = {each.name.rpartition(".")[0] for each in copies.targets()}
    if random_seed is not None:
        load_random_weights(copies.targets(), dtype=dtype, seed=random_seed)
    elif modules:
        target = spec.target
        tied = {f"{EMBEDDING}.weight": HEAD} if target.tie_word_embeddings else {}
        modules |= {"lm_head"} if tied else set()
        with source.open() as checkpoint:
            selected = _select(checkpoint.tensors, target, modules)
            load_weights(copies.targets(), checkpoint, dtype=dtype, tied=tied, selected=selected)
    copies.bind()
    return copies


def _select(
    tensors: Mapping[str, TensorInfo], target: ModelSpec, modules: Collection[str]
) -> dict[str, TensorInfo]:
    """The modules' tensors, under the names in our models."""
    drafts, selected = draft_tensors(target), {}
    for name, info in tensors.items():
        if TOWERS.search(name) or (drafts is not None and drafts.search(name)):
            continue
        found = _TOKENS.search(name)
        if found is not None and _NAMES[found[1]] in modules:
            selected[_NAMES[found[1]] + found[2]] = info
    return selected
