"""What a GGUF file says of its model, as the config.json and the tensor names of Hugging Face's layout.

llama.cpp's converter has a class for each architecture; `FAMILIES` has those whose conversion is undone here.
A key of the architecture that is not read becomes a field of the config under its own name. The config's
reader refuses it: it may change what the model computes.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from quire.errors import CheckpointError, UnsupportedModelError
from quire.weights.gguf_header import Entry

Metadata = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Family:
    architecture: str
    names: Mapping[str, str] = field(default_factory=dict)
    """Names in a block that differ from `BLOCK_NAMES`."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Keys besides `FIELDS`."""
    permuted: bool = False
    """The rows of q and k in each head are in the order of rotated pairs: (0, d/2, 1, d/2 + 1, ...)."""
    norms_plus_one: bool = False
    """Norms are stored as 1 + weight."""


WINDOW = {"attention.sliding_window": "sliding_window"}
GEMMA_NAMES = {"ffn_norm": "pre_feedforward_layernorm"}
GEMMA_FIELDS = {
    **WINDOW,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
}
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", permuted=True),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", names={"ffn_up": "mlp.gate_up_proj"}, fields=WINDOW),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA_NAMES, GEMMA_FIELDS, norms_plus_one=True),
    "gemma3": Family("Gemma3ForCausalLM", GEMMA_NAMES, GEMMA_FIELDS, norms_plus_one=True),
    "olmo2": Family("Olmo2ForCausalLM", fields=WINDOW),
    "granite": Family("GraniteForCausalLM", fields=GRANITE, permuted=True),
    "smollm3": Family("SmolLM3ForCausalLM", permuted=True),
}
"""general.architecture -> how to read it. Mistral is a llama there."""

FIELDS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_local_experts",
}
"""Key without the architecture -> field of config.json."""
REQUIRED = (
    "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon",
)  # fmt: skip
IGNORED = (
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon",
    "expert_used_count",
)  # fmt: skip
"""Keys that change nothing, or that others say as well: the rows of token_embd are the vocabulary."""

MODEL_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors of rotary frequencies: part of the config."""


def family_of(metadata: Metadata) -> Family:
    """Raises `CheckpointError` for an architecture that is not read."""
    name = metadata.get("general.architecture")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"general.architecture is {name!r:.80}; GGUF files are read of the architectures "
            f"{', '.join(FAMILIES)}. Use the model's safetensors files"
        )
    return family


def hf_name(family: Family, name: str) -> str | None:
    """A tensor's name in Hugging Face's layout. None: it is no weight. An unknown one keeps its name."""
    if name in ROPE_TENSORS:
        return None
    stem, _, suffix = name.rpartition(".")
    parts = stem.split(".")
    if stem in MODEL_NAMES:
        return f"{MODEL_NAMES[stem]}.{suffix}"
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal():
        if parts[2] == "attn_rot_embd":  # frequencies, of old files
            return None
        inner = family.names.get(parts[2]) or BLOCK_NAMES.get(parts[2])
        if inner is not None:
            return f"model.layers.{int(parts[1])}.{inner}.{suffix}"
    return name


def read_config(
    metadata: Metadata, tensors: Mapping[str, Entry], values: Callable[[str], Sequence[float]]
) -> dict[str, object]:
    """config.json without a `quantization_config`. tensors: by their names in the file. values: those of a
    small float32 tensor, by its name."""
    family, name = family_of(metadata), str(metadata["general.architecture"])
    keys = _Keys(metadata, name)
    config: dict[str, object] = {"architectures": [family.architecture]}
    for key in REQUIRED:
        if keys.get(key) is None:
            raise CheckpointError(f"{name}.{key} is missing in the GGUF file; convert it again")
    for key, field_name in {**FIELDS, **family.fields}.items():
        if (value := keys.get(key)) is not None:
            config[field_name] = value
    head_dim = _head_dim(config, keys)
    config["head_dim"] = head_dim
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("the GGUF file has no tensor token_embd.weight; it is no whole model")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if "blk.0.attn_output.bias" in tensors:
        config["attention_bias"] = True
    if "blk.0.ffn_down.bias" in tensors:
        config["mlp_bias"] = True
    config["dtype"] = _dtype(tensors, family)
    rope_dim = keys.get("rope.dimension_count")
    if rope_dim not in (None, head_dim):
        if type(rope_dim) is not int:
            raise CheckpointError(f"{name}.rope.dimension_count is {rope_dim!r:.80}, no integer")
        config["partial_rotary_factor"] = rope_dim / head_dim
    if scaling := _rope_scaling(keys, tensors, values):
        config["rope_scaling"] = scaling
    if "attention.sliding_window" in family.fields:
        _read_windows(config, keys)
    _PECULIAR.get(name, lambda config: None)(config)
    for key in ("num_local_experts", "sliding_window"):
        if config.get(key) == 0:
            del config[key]
    return config | keys.unread()


class _Keys:
    """The keys of the architecture. Remembers which were read."""

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self._prefix = architecture + "."
        self._metadata = metadata
        self._read = {self._prefix + key for key in IGNORED}

    def get(self, key: str) -> object:
        """The value, or None. Of an array with a value for each layer, the value if all are equal."""
        self._read.add(self._prefix + key)
        value = self._metadata.get(self._prefix + key)
        if isinstance(value, array) and len(set(value)) == 1:
            value = value[0]
        return _shortest(value) if isinstance(value, float) else value

    def unread(self) -> dict[str, object]:
        return {
            key: list(value)
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value
            for key, value in self._metadata.items()
            if key.startswith(self._prefix) and key not in self._read
        }


def _shortest(value: float) -> float:
    """The decimal number that was rounded to this float32: 1e-05 for 9.999999747378752e-06."""
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
        except OverflowError:
            break
    return value


def _head_dim(config: Mapping[str, object], keys: _Keys) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim")
    if type(hidden) is not int or type(heads) is not int or not 0 < heads <= hidden:
        raise CheckpointError(
            f"the GGUF file has embedding_length {hidden!r:.80} and head_count {heads!r:.80}; heads must be "
            "equal in all layers"
        )
    if head_dim is None:
        head_dim = hidden // heads
    value_length = keys.get("attention.value_length")
    if type(head_dim) is not int or head_dim < 2 or value_length not in (None, head_dim):
        raise UnsupportedModelError(
            f"the GGUF file has key_length {head_dim!r:.80} and value_length {value_length!r:.80}; only "
            "keys and values of one length are supported"
        )
    return head_dim


def _dtype(tensors: Mapping[str, Entry], family: Family) -> str:
    """To compute in: that of the matrices, bfloat16 if they are quantized. (Gemma's values overflow
    float16.)"""
    types = {entry.type for entry in tensors.values() if len(entry.shape) > 1}
    if types == {"float32"}:
        return "float32"
    if types <= {"float32", "float16"} and not family.norms_plus_one:
        return "float16"
    return "bfloat16"


def _rope_scaling(
    keys: _Keys, tensors: Mapping[str, Entry], values: Callable[[str], Sequence[float]]
) -> dict[str, object] | None:
    """Llama 3's scaling is stored as its effect: a divisor for each frequency. So is LongRoPE."""
    kind, factor = keys.get("rope.scaling.type"), keys.get("rope.scaling.factor")
    old = keys.get("rope.scale_linear")
    original = keys.get("rope.scaling.original_context_length")
    attention = keys.get("rope.scaling.attn_factor")
    freqs, long, short = (name if name in tensors else None for name in ROPE_TENSORS)
    scaling: dict[str, object]
    if freqs:
        scaling = {"long_factor": values(freqs), "short_factor": values(freqs)}
        kind = "longrope" if kind in (None, "none") else f"{kind} with rope_freqs"
    elif long and short:
        scaling = {"long_factor": values(long), "short_factor": values(short)}
        scaling |= {"original_max_position_embeddings": original, "attention_factor": attention}
        kind = "longrope"
    elif kind == "yarn":
        scaling = {"factor": factor, "original_max_position_embeddings": original}
        scaling["attention_factor"] = keys.get("rope.scaling.yarn_attn_factor")
        scaling["beta_fast"] = keys.get("rope.scaling.yarn_beta_fast")
        scaling["beta_slow"] = keys.get("rope.scaling.yarn_beta_slow")
    elif kind == "linear" or (kind is None and old not in (None, 1.0)):
        scaling, kind = {"factor": factor or old}, "linear"
    elif kind in (None, "none", "longrope"):  # longrope without tensors: a short context
        return None
    else:
        scaling = {}
    return {"rope_type": kind, **{k: value for k, value in scaling.items() if value is not None}}


def _read_windows(config: dict[str, object], keys: _Keys) -> None:
    """Which layers have the window: a number is the distance of layers without."""
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, array):
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [kinds[bool(windowed)] for windowed in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern


def _gemma(config: dict[str, object], *, layers_of_largest: int) -> None:
    """Scores are divided by the root of a head's size, but in the 27B models by that of an equal share of the
    hidden size. The file does not say so; the number of layers does, as in llama.cpp."""
    is_largest = config["num_hidden_layers"] == layers_of_largest
    share = config["hidden_size"] // config["num_attention_heads"]  # type: ignore[operator]
    config["query_pre_attn_scalar"] = share if is_largest else config["head_dim"]
    if not config.get("sliding_window"):
        config["sliding_window_pattern"] = 1


def _granite(config: dict[str, object]) -> None:
    config.setdefault("attention_multiplier", config["head_dim"] ** -0.5)  # type: ignore[operator]


def _olmo(config: dict[str, object]) -> None:
    """OLMo 3 is an OLMo 2 with windows."""
    if config.get("sliding_window"):
        config["architectures"] = ["Olmo3ForCausalLM"]


_PECULIAR: Mapping[str, Callable[[dict[str, object]], None]] = {
    "gemma2": partial(_gemma, layers_of_largest=46),
    "gemma3": partial(_gemma, layers_of_largest=62),
    "granite": _granite,
    "olmo2": _olmo,
}
"""What the files of an architecture leave out."""
