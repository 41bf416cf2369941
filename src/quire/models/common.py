"""Reads the fields that the families' configs share, so that a family's file has only its own.

A family reads the sizes, describes its layers, and lets `read_spec` read the rest, which rejects every field
that was not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quire.dtypes import FLOATS
from quire.layers.spec import AttentionSpec, MlpSpec, NormSpec, RopeSpec
from quire.models.context import read_context_length
from quire.models.fields import (
    MOE_FIELDS,
    QUANTIZATION_FIELDS,
    ConfigReader,
    unsupported,
)
from quire.models.rope_config import DEFAULT_THETA, FULL, SLIDING, RopeDefaults, read_rope
from quire.models.spec import LayerSpec, ModelSpec, Placement
from quire.quantization import read_method
from quire.quantization.base import LinearMethod

if TYPE_CHECKING:
    from quire.kernels.ops import Activation

LLAMA_NORM = NormSpec(eps=1e-6)
MAX_LAYERS = 4096
MAX_HEAD_DIM = 512
ACTIVATION_NAMES: Mapping[Activation, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu_tanh": ("gelu_pytorch_tanh",),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes in every config, checked for consistency."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: Activation
    max_position_embeddings: int

    @property
    def attention(self) -> AttentionSpec:
        """That of a layer without special features."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
        )

    @property
    def mlp(self) -> MlpSpec:
        return MlpSpec(intermediate_size=self.intermediate_size, activation=self.activation)

    def rope_defaults(self, *, theta: float = DEFAULT_THETA) -> RopeDefaults:
        return RopeDefaults(
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            theta=theta,
        )


def read_sizes(
    reader: ConfigReader,
    *,
    model_type: str,
    default_num_kv_heads: int | None,
    default_head_dim: int | None = None,
    activation: Activation = "silu",
) -> Sizes:
    """Reject another family's config, then read the sizes.

    The `default_*` arguments are what transformers' own config class assumes when a field is left out: a file
    written by it may rely on them.
    """
    _reject_other_models(reader, model_type, activation)
    hidden_size, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    num_kv_heads = read_num_kv_heads(reader, num_heads=num_heads, default=default_num_kv_heads)
    head_dim = read_head_dim(
        reader, hidden_size=hidden_size, num_heads=num_heads, default=default_head_dim
    )
    return Sizes(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=reader.integer("num_hidden_layers", at_most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        activation=activation,
        max_position_embeddings=reader.integer("max_position_embeddings"),
    )


def stack(
    attention: Iterable[AttentionSpec], mlp: MlpSpec, *, placement: Placement = "pre"
) -> tuple[LayerSpec, ...]:
    """Layers that differ in their attention only."""
    return tuple(LayerSpec(placement=placement, attention=each, mlp=mlp) for each in attention)


def read_spec(
    reader: ConfigReader,
    sizes: Sizes,
    *,
    architecture: str,
    layers: tuple[LayerSpec, ...],
    norm: NormSpec = LLAMA_NORM,
    ropes: tuple[RopeSpec, ...] | None = None,
    default_tied: bool = False,
    default_eos_token_ids: tuple[int, ...] = (),
) -> ModelSpec:
    """Read what remains (context, ends and dtype), then `finish()` the reader.

    norm: its eps counts where the config gives none. ropes: None: one, with transformers' usual defaults.
    """
    ropes = ropes or (read_rope(reader, sizes.rope_defaults()),)
    context_length, context_source = read_context_length(
        reader, ropes, max_position_embeddings=sizes.max_position_embeddings
    )
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers=layers,
        norm=replace(norm, eps=reader.number("rms_norm_eps", default=norm.eps)),
        ropes=ropes,
        context_length=context_length,
        context_source=context_source,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=default_tied),
        checkpoint_dtype=_read_dtype(reader),
        default_eos_token_ids=() if reader.nulled("eos_token_id") else default_eos_token_ids,
        quantization=_read_quantization(reader),
    )
    reader.finish()
    return spec


def read_num_kv_heads(reader: ConfigReader, *, num_heads: int, default: int | None) -> int:
    """Heads of the KV cache; an explicit null means one per query head, as transformers reads it."""
    fallback = num_heads if default is None or reader.nulled("num_key_value_heads") else default
    num_kv_heads = reader.integer("num_key_value_heads", default=fallback)
    if num_heads % num_kv_heads:
        rule = f"num_attention_heads ({num_heads}) must be a multiple of it"
        raise reader.bad("num_key_value_heads", rule)
    return num_kv_heads


def read_head_dim(
    reader: ConfigReader, *, hidden_size: int, num_heads: int, default: int | None
) -> int:
    """Size of one head: explicit, the family's own default, or an equal share of the hidden size."""
    if not reader.has("head_dim") and default is None and hidden_size % num_heads:
        raise reader.bad(
            "hidden_size",
            f"without head_dim it must be a multiple of num_attention_heads ({num_heads})",
        )
    head_dim = reader.integer("head_dim", default=default or hidden_size // num_heads)
    if head_dim > MAX_HEAD_DIM:
        raise reader.bad(
            "head_dim", f"attention kernels go up to {MAX_HEAD_DIM} (it came to {head_dim})"
        )
    if head_dim % 2:
        raise reader.bad(
            "head_dim", f"rotary embedding needs an even head size (it came to {head_dim})"
        )
    return head_dim


def read_layer_windows(reader: ConfigReader, *, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's layer-wise windows: `layer_types` if given, else every layer from `max_window_layers` on.

    transformers turns the window off altogether unless `use_sliding_window` is set, whatever the
    other fields say.
    """
    use_window = reader.boolean("use_sliding_window", default=False)
    window = read_window(reader, default=4096)
    first = reader.integer("max_window_layers", default=28, at_least=0)
    layer_types = read_layer_types(reader, num_layers=num_layers)
    if not use_window:
        window = None
    if layer_types is None:
        return tuple(window if i >= first else None for i in range(num_layers))
    return windows_of_layer_types(reader, layer_types, window=window)


def read_periodic_windows(
    reader: ConfigReader, *, num_layers: int, period: int
) -> tuple[int | None, ...]:
    """By `layer_types`; without them each `period`-th layer sees everything (Gemma, OLMo 3)."""
    layer_types = read_layer_types(reader, num_layers=num_layers) or [
        SLIDING if (i + 1) % period else FULL for i in range(num_layers)
    ]
    window = read_window(reader, default=4096)
    return windows_of_layer_types(reader, layer_types, window=window)


def read_window(reader: ConfigReader, *, default: int | None) -> int | None:
    """Tokens that a query sees in a layer with a window; null means that there is none."""
    if default is None or reader.nulled("sliding_window"):
        return reader.integer("sliding_window") if reader.has("sliding_window") else None
    return reader.integer("sliding_window", default=default)


def read_layer_types(reader: ConfigReader, *, num_layers: int) -> tuple[str, ...] | None:
    """What kind of attention each layer has, or None where the config does not say it."""
    layer_types = reader.names("layer_types")
    if layer_types is None:
        return None
    unknown = sorted(set(layer_types) - {FULL, SLIDING})
    if unknown:
        raise reader.bad("layer_types", f"{unknown[0]!r} is not one of {FULL}, {SLIDING}")
    if len(layer_types) != num_layers:
        rule = f"it has {len(layer_types)} entries for num_hidden_layers {num_layers}"
        raise reader.bad("layer_types", rule)
    return layer_types


def windows_of_layer_types(
    reader: ConfigReader, layer_types: Sequence[str], *, window: int | None
) -> tuple[int | None, ...]:
    """One window per layer."""
    if SLIDING in layer_types and window is None:
        raise reader.bad(
            "layer_types", f"{SLIDING} needs sliding_window (and use_sliding_window true)"
        )
    return tuple(window if kind == SLIDING else None for kind in layer_types)


def _read_dtype(reader: ConfigReader) -> str | None:
    """transformers 5 writes `dtype`, 4 wrote `torch_dtype`; with neither, it is that of the weights."""
    reader.raw("torch_dtype")
    field = "dtype" if reader.has("dtype") else "torch_dtype"
    if not reader.has(field):
        return None
    name = reader.text(field, default="").removeprefix("torch.")
    if name not in FLOATS:
        raise reader.bad(field, f"supported dtypes are {', '.join(FLOATS)}")
    return name


def _read_quantization(reader: ConfigReader) -> LinearMethod:
    configs = [reader.mapping(field) for field in QUANTIZATION_FIELDS]
    return read_method(next(filter(None, configs), {}))


def _reject_other_models(reader: ConfigReader, model_type: str, activation: Activation) -> None:
    """Specific errors for frequent mistakes: another family's config, experts, another activation."""
    if reader.text("model_type", default=model_type) != model_type:
        raise reader.bad(
            "model_type", f"this architecture is only known with model_type {model_type!r}"
        )
    for field in MOE_FIELDS:
        if reader.raw(field):
            remedy = "use a dense model of this family"
            raise unsupported(
                field, reader.raw(field), rule="mixture of experts is not supported", remedy=remedy
            )
    names = ACTIVATION_NAMES[activation]
    for field in ("hidden_act", "hidden_activation"):
        if reader.text(field, default=names[0]) not in names:
            raise reader.bad(field, f"only {names[0]!r} is supported")
