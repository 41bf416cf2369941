"""What the families' configs share, so that a family's file holds only what is its own.

A family reads the sizes, says what its layers are, and lets `read_spec` read the rest, which rejects whatever
nobody understood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.layers.spec import AttentionSpec, MlpSpec, NormSpec
from quire.models.context import read_context_length
from quire.models.fields import (
    MOE_FIELDS,
    QUANTIZATION_FIELDS,
    ConfigReader,
    unsupported,
)
from quire.models.rope_config import read_rope
from quire.models.spec import LayerSpec, ModelSpec, Placement

DTYPES = ("bfloat16", "float16", "float32")
MAX_LAYERS = 4096
MAX_HEAD_DIM = 512
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes every config gives, checked to belong to one model."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int

    @property
    def attention(self) -> AttentionSpec:
        """A plain layer's."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
        )

    @property
    def mlp(self) -> MlpSpec:
        return MlpSpec(intermediate_size=self.intermediate_size)


def read_sizes(
    reader: ConfigReader,
    *,
    model_type: str,
    default_num_kv_heads: int | None,
    default_head_dim: int | None = None,
) -> Sizes:
    """Refuse another family's config, then read the sizes.

    The `default_*` arguments are what transformers' own config class assumes when a field is left out: a file
    written by it may rely on them.
    """
    _reject_other_models(reader, model_type)
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
        max_position_embeddings=reader.integer("max_position_embeddings"),
    )


def stack(
    attention: AttentionSpec,
    mlp: MlpSpec,
    *,
    windows: Sequence[int | None],
    placement: Placement = "pre",
) -> tuple[LayerSpec, ...]:
    """One layer for each window, otherwise alike."""
    return tuple(
        LayerSpec(placement=placement, attention=replace(attention, window=window), mlp=mlp)
        for window in windows
    )


def read_spec(
    reader: ConfigReader,
    sizes: Sizes,
    *,
    architecture: str,
    layers: tuple[LayerSpec, ...],
    default_eos_token_ids: tuple[int, ...] = (),
) -> ModelSpec:
    """Read what remains: norm, rotary embedding, context and ends; then `finish()` the reader."""
    rope = read_rope(
        reader,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.max_position_embeddings,
    )
    context_length, context_source = read_context_length(
        reader, rope, max_position_embeddings=sizes.max_position_embeddings
    )
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers=layers,
        norm=NormSpec(eps=reader.number("rms_norm_eps", default=1e-6)),
        ropes=(rope,),
        context_length=context_length,
        context_source=context_source,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
        checkpoint_dtype=_read_dtype(reader),
        default_eos_token_ids=() if reader.nulled("eos_token_id") else default_eos_token_ids,
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
    window = (
        None if reader.nulled("sliding_window") else reader.integer("sliding_window", default=4096)
    )
    first = reader.integer("max_window_layers", default=28, at_least=0)
    layer_types = reader.names("layer_types")
    if not use_window:
        window = None
    if layer_types is None:
        return tuple(window if i >= first else None for i in range(num_layers))
    return windows_of_layer_types(reader, layer_types, num_layers=num_layers, window=window)


def windows_of_layer_types(
    reader: ConfigReader, layer_types: tuple[str, ...], *, num_layers: int, window: int | None
) -> tuple[int | None, ...]:
    """One window per layer from the config's `layer_types` list."""
    unknown = sorted(set(layer_types) - {FULL, SLIDING})
    if unknown:
        raise reader.bad("layer_types", f"{unknown[0]!r} is not one of {FULL}, {SLIDING}")
    if len(layer_types) != num_layers:
        rule = f"it has {len(layer_types)} entries for num_hidden_layers {num_layers}"
        raise reader.bad("layer_types", rule)
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
    if name not in DTYPES:
        raise reader.bad(field, f"supported dtypes are {', '.join(DTYPES)}")
    return name


def _reject_other_models(reader: ConfigReader, model_type: str) -> None:
    """The mistakes worth their own words: another family's config, quantized weights, experts,
    another activation.
    """
    if reader.text("model_type", default=model_type) != model_type:
        raise reader.bad(
            "model_type", f"this architecture is only known with model_type {model_type!r}"
        )
    for field in QUANTIZATION_FIELDS:
        if reader.raw(field):
            remedy = "use the model's unquantized checkpoint"
            raise unsupported(
                field, reader.raw(field), rule="quantized weights are not supported", remedy=remedy
            )
    for field in MOE_FIELDS:
        if reader.raw(field):
            remedy = "use a dense model of this family"
            raise unsupported(
                field, reader.raw(field), rule="mixture of experts is not supported", remedy=remedy
            )
    for field in ("hidden_act", "hidden_activation"):
        if reader.text(field, default="silu") not in ("silu", "swish"):
            raise reader.bad(field, "only 'silu' is supported")
