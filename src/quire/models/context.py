"""The number of positions of a model, from all fields of its config about it. It is derived only here.

As vLLM derives it: the smallest of the fields that name a length, times the factor of a rotary embedding
that stretches it. `max_position_embeddings` counts positions before stretching for the linear and dynamic
types, and after it for llama3 and longrope, and where layers differ in their embedding (Gemma 3, OLMo 3).
YaRN's length is its original one times its factor, whatever the field says: Qwen's cards tell users to add
`rope_scaling` and to leave the field alone, DeepSeek's configs hold the product.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.layers.spec import RopeSpec
from quire.models.fields import MAX_SIZE, ConfigReader

OTHER_FIELDS = (
    "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_seq_length", "seq_len",
    "model_max_length",
)  # fmt: skip
"""Besides `max_position_embeddings`. A value that is not a length is ignored."""


def read_context_length(
    reader: ConfigReader, ropes: Sequence[RopeSpec], *, max_position_embeddings: int
) -> tuple[int, str]:
    """The positions that a request may use, and the field that determines them (for messages)."""
    lengths = {"max_position_embeddings": max_position_embeddings}
    for name in OTHER_FIELDS:
        value = reader.raw(name)
        if type(value) is int and 1 <= value <= MAX_SIZE:
            lengths[name] = value
    field = min(lengths, key=lambda name: lengths[name])
    rope = ropes[0]
    if len(ropes) > 1:
        return lengths[field], field
    if rope.type == "yarn":
        length = rope.original_max_position_embeddings * rope.factor
        return _bounded(length), "YaRN's original_max_position_embeddings times its factor"
    if rope.type in ("linear", "dynamic"):
        return _bounded(lengths[field] * rope.factor), f"{field} times the rotary factor"
    return lengths[field], field


def _bounded(length: float) -> int:
    return int(min(length, MAX_SIZE))
