"""Layers that draft tokens from the hidden states of another model, in numbers; torch-free.

EAGLE (Li et al. 2401.15077), EAGLE-3 (Li et al. 2503.01840) and the layers for multi-token prediction
(MTP; DeepSeek-V3, 2412.19437, section 2.2) are one decoder layer each. Its input for the token at position
i is the embedding of token i + 1 and the target's hidden state at i; its result predicts token i + 2, and is
the hidden state for the next draft. How the two inputs are joined differs.

EAGLE and EAGLE-3 are directories of their own, with a config.json in the form of a Llama or Qwen3 model, or
in that of vllm-project/speculators. MTP layers are in the target's checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from quire.errors import CheckpointError, UnsupportedModelError
from quire.layers.spec import NormSpec, RopeSpec
from quire.models.fields import ConfigReader, unsupported
from quire.models.registry import resolve_spec
from quire.models.spec import LayerSpec, ModelSpec
from quire.quantization.base import LinearMethod, LinearPart, LinearShape
from quire.quantization.unquantized import UNQUANTIZED
from quire.weights.source import Checkpoint, ModelSource, TensorInfo

FUSE, HEAD, EMBEDDING = "model.fc", "lm_head", "model.embed_tokens"
MODEL_TYPES = ("llama", "qwen3", "mistral", "qwen2")
"""Families of layers that a head may have."""
EMBEDDING_SAMPLE = 1 << 20
"""Bytes."""
SPECULATORS_FIELDS = frozenset(
    "architectures auto_map base_model_ep_plan dtype torch_dtype embed_requires_grad has_no_defaults_at_init "
    "speculators_model_type speculators_version tie_word_embeddings transformers_version".split()
)
"""Fields of the speculators format that do not change what a head computes."""


@dataclass(frozen=True, slots=True)
class HeadNames:
    """Names of modules in the checkpoint; None where the head has no such norm."""

    layer: str
    join: str
    """The product that joins the two inputs or, in EAGLE-3, the target's hidden states."""
    embedding_norm: str | None = None
    state_norm: str | None = None
    input_norm: str | None = None
    """Before attention."""
    final_norm: str | None = None
    """Before the output head."""

    @property
    def mlp_norm(self) -> str:
        return f"{self.layer}.post_attention_layernorm"


EAGLE = HeadNames(layer="model.layers.0", join=FUSE)
EAGLE3 = HeadNames(
    layer="model.layers.0",
    join=FUSE,
    embedding_norm="model.layers.0.input_layernorm",
    state_norm="model.layers.0.hidden_norm",
    final_norm="model.norm",
)


@dataclass(frozen=True, slots=True)
class HeadSpec:
    method: str
    """"eagle", "eagle3" or "mtp"."""
    target: ModelSpec
    layer: LayerSpec
    norm: NormSpec
    rope: RopeSpec
    hidden_size: int
    names: HeadNames
    taps: tuple[int, ...]
    """`DecoderModel.taps` of the target."""
    reads_normed: bool = False
    """Whether it reads the target's hidden states after the final norm."""
    recycles_normed: bool = False
    """Whether the hidden state for the next draft is the result after `final_norm`."""
    state_first: bool = False
    """Whether the hidden state is before the embedding in the input of `names.join`."""
    join_bias: bool = False
    norm_before_residual: bool = False
    """EAGLE-3: the residual is the hidden state after `state_norm`, not before."""
    tap_norms: tuple[str, ...] = ()
    """EAGLE-3: names of norms of the target's hidden states, of all together or of each."""
    draft_vocab_size: int | None = None
    """Size of its own output head; None: the target's head."""
    has_offsets: bool = False
    """Whether token i of its own head is token i + d2t[i] of the target."""
    has_embedding: bool = False
    """Whether it has its own embedding; else it uses the target's."""
    quantization: LinearMethod = UNQUANTIZED

    @property
    def joins_taps(self) -> bool:
        """EAGLE-3: `names.join` is for the target's hidden states, and queries, keys and values are made of
        both inputs."""
        return self.layer.attention.fused_input

    @property
    def join(self) -> LinearShape:
        target = self.target.hidden_size
        width = target * len(self.taps) if self.joins_taps else target + self.hidden_size
        return LinearShape(width, (LinearPart(self.names.join, self.hidden_size),), self.join_bias)

    @property
    def head(self) -> LinearShape | None:
        if self.draft_vocab_size is None:
            return None
        return LinearShape(self.hidden_size, (LinearPart(HEAD, self.draft_vocab_size),), bias=False)

    @property
    def norms(self) -> dict[str, int]:
        """Sizes of the norms, by name."""
        names = self.names
        own = (
            names.embedding_norm,
            names.state_norm,
            names.input_norm,
            names.mlp_norm,
            names.final_norm,
        )
        width = len(self.taps) * self.target.hidden_size
        taps = dict.fromkeys(self.tap_norms, width // max(1, len(self.tap_norms)))
        return {name: self.hidden_size for name in own if name is not None} | taps

    def linears(self) -> Iterator[LinearShape]:
        yield self.join
        yield from self.layer.attention.linears(f"{self.names.layer}.self_attn", self.hidden_size)
        yield from self.layer.mlp.linears(f"{self.names.layer}.mlp", self.hidden_size)
        if self.head is not None:
            yield self.head

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Without norms, which are small."""
        linears = sum(self.quantization.weight_bytes(each, dtype_bytes) for each in self.linears())
        embedding = self.target.vocab_size * self.hidden_size if self.has_embedding else 0
        return linears + embedding * dtype_bytes

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        return 2 * self.layer.attention.kv_size * dtype_bytes

    def select(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The head's tensors among a checkpoint's, under the names that `names` has."""
        if self.method == "mtp":
            ours = [f"{self.names.layer}.", f"{self.names.join}."]
            return {
                name: info
                for name, info in tensors.items()
                if any(name.startswith(prefix) for prefix in ours)
                and not name.endswith((".shared_head.head.weight", ".embed_tokens.weight"))
            }
        unused = {"t2d"} | (set() if self.has_embedding else {"embed_tokens.weight"})
        found = {_own_name(name): info for name, info in tensors.items()}
        return {
            name: info for name, info in found.items() if name.removeprefix("model.") not in unused
        }


def _own_name(name: str) -> str:
    return name.replace("midlayer.", "layers.0.")


def resolve_head(
    method: str, source: ModelSource, target: ModelSpec, target_source: ModelSource
) -> HeadSpec:
    """method: "eagle", "eagle3" or "mtp". source: of the head; MTP layers are in the target's.

    Raises:
        UnsupportedModelError: for a field or value that is not implemented, or does not fit the target.
        CheckpointError: for a file that is missing or damaged.
    """
    if method == "mtp":
        with target_source.open() as checkpoint:
            return _resolve_mtp(target, checkpoint.tensors)
    config = source.config()
    if "speculators_model_type" in config:
        config = _from_speculators(config, method)
    read = _resolve_eagle3 if method == "eagle3" else _resolve_eagle
    with source.open() as checkpoint:
        names = {_own_name(name).removeprefix("model.") for name in checkpoint.tensors}
        spec = read(config, names, target)
        if spec.has_embedding and spec.hidden_size == target.hidden_size:
            with target_source.open() as other:
                spec = replace(spec, has_embedding=not _same_embedding(checkpoint, other))
    return spec


def _same_embedding(checkpoint: Checkpoint, other: Checkpoint) -> bool:
    """Whether both begin with the same bytes: EAGLE's files hold a copy of the target's."""
    found = []
    for each in (checkpoint, other):
        names = [name for name in each.tensors if name.endswith("embed_tokens.weight")]
        if len(names) != 1:
            return False
        info = each.tensors[names[0]]
        data = bytearray(min(info.num_bytes, EMBEDDING_SAMPLE))
        each.read(info, 0, memoryview(data))
        found.append((info.dtype, info.shape, data))
    return found[0] == found[1]


# --- MTP --------------------------------------------------------------------------------------------------


def _mtp_names(prefix: str) -> Mapping[str, HeadNames]:
    """By the product that joins the inputs, which no two forms call the same."""
    mimo = HeadNames(
        layer=prefix,
        join=f"{prefix}.input_proj",
        embedding_norm=f"{prefix}.token_layernorm",
        state_norm=f"{prefix}.hidden_layernorm",
        input_norm=f"{prefix}.input_layernorm",
        final_norm=f"{prefix}.final_layernorm",
    )
    deepseek = HeadNames(
        layer=prefix,
        join=f"{prefix}.eh_proj",
        embedding_norm=f"{prefix}.enorm",
        state_norm=f"{prefix}.hnorm",
        input_norm=f"{prefix}.input_layernorm",
        final_norm=f"{prefix}.shared_head.norm",
    )
    return {mimo.join: mimo, deepseek.join: deepseek}


def draft_tensors(target: ModelSpec) -> re.Pattern[str] | None:
    """Names of a target's tensors that belong to its MTP layers, if it has any."""
    first, count = target.num_layers, target.num_draft_layers
    numbers = "|".join(str(first + i) for i in range(count))
    return re.compile(rf"(^|\.)(mtp_layers\.\d+|layers\.({numbers}))\.") if count else None


def _resolve_mtp(target: ModelSpec, tensors: Mapping[str, TensorInfo]) -> HeadSpec:
    """The first of several layers drafts all tokens."""
    prefixes = "model.mtp_layers.0", f"model.layers.{target.num_layers}"
    forms = {join: names for prefix in prefixes for join, names in _mtp_names(prefix).items()}
    found = [names for join, names in forms.items() if f"{join}.weight" in tensors]
    if not target.num_draft_layers or not found:
        raise UnsupportedModelError(
            "method mtp needs layers for multi-token prediction, and this model's checkpoint has none that "
            f"Quire knows (config.json: num_nextn_predict_layers is {target.num_draft_layers}; tensors: none "
            f"of {', '.join(forms)}); use method suffix or eagle3"
        )
    names = found[0]
    # MiMo's layer reads and makes hidden states before a norm and has them first: exllamav3 #238.
    is_mimo = names.join.endswith("input_proj")
    layer = target.layers[-1]
    return HeadSpec(
        method="mtp",
        target=target,
        layer=layer,
        norm=target.norm,
        rope=target.ropes[layer.attention.rope or 0],
        hidden_size=target.hidden_size,
        names=names,
        taps=(target.num_layers,),
        reads_normed=not is_mimo,
        recycles_normed=not is_mimo,
        state_first=is_mimo,
        quantization=target.quantization,
    )


# --- EAGLE ------------------------------------------------------------------------------------------------


def _from_speculators(config: Mapping[str, object], method: str) -> dict[str, object]:
    """A config of vllm-project/speculators, as a flat one."""
    reader = ConfigReader(config)
    kind = reader.text("speculators_model_type", default="")
    if kind != method:
        raise reader.bad("speculators_model_type", f"with method {method!r} it must be the same")
    layer = reader.mapping("transformer_layer_config")
    if layer is None:
        raise reader.bad("transformer_layer_config", "it must be an object")
    # The trainer's default, unlike that of flat files.
    before = reader.boolean("norm_before_residual", default=True)
    own = {"transformer_layer_config", "speculators_config", *SPECULATORS_FIELDS}
    others = {field: value for field, value in config.items() if field not in own}
    return {**layer, **others, "norm_before_residual": before}


def _layer_spec(config: Mapping[str, object], reader: ConfigReader, target: ModelSpec) -> ModelSpec:
    """The head's layer as a model of its family. reader: has read the fields that only heads have."""
    model_type = reader.text("model_type", default="llama")
    if model_type not in MODEL_TYPES:
        raise reader.bad("model_type", f"heads have layers of {', '.join(MODEL_TYPES)}")
    rest = {field: value for field, value in config.items() if not reader.was_read(field)}
    spec = resolve_spec({**rest, "model_type": model_type, "architectures": None})
    if spec.num_layers != 1:
        raise reader.bad("num_hidden_layers", "heads of one layer are supported")
    if spec.vocab_size != target.vocab_size:
        rule = f"the target has {target.vocab_size} tokens; the head is for another model"
        raise reader.bad("vocab_size", rule)
    return spec


def _resolve_eagle(config: dict[str, object], names: set[str], target: ModelSpec) -> HeadSpec:
    reader = ConfigReader(config)
    for field in ("bias", "truncated_vocab_size", "method"):
        reader.raw(field)
    if reader.integer("draft_vocab_size", default=target.vocab_size) != target.vocab_size:
        raise reader.bad("draft_vocab_size", "with method 'eagle' it is vocab_size; try eagle3")
    spec = _layer_spec(config, reader, target)
    _same_width(reader, "hidden_size", spec.hidden_size, target)
    own_norm = "layers.0.input_layernorm"
    return HeadSpec(
        method="eagle",
        target=target,
        layer=spec.layers[0],
        norm=spec.norm,
        rope=spec.ropes[0],
        hidden_size=spec.hidden_size,
        names=replace(
            EAGLE, input_norm=f"model.{own_norm}" if f"{own_norm}.weight" in names else None
        ),
        taps=(target.num_layers,),
        reads_normed=True,
        join_bias="fc.bias" in names,
        has_embedding="embed_tokens.weight" in names,
        quantization=spec.quantization,
    )


def _resolve_eagle3(config: dict[str, object], names: set[str], target: ModelSpec) -> HeadSpec:
    reader = ConfigReader(config)
    nested = reader.mapping("eagle_config") or {}
    inner = ConfigReader(
        {"norm_before_fc": config.get("norm_before_fc"), **nested}, prefix="eagle_config."
    )
    reader.raw("norm_before_fc")
    if not inner.boolean("use_aux_hidden_state", default=True):
        raise inner.bad(
            "use_aux_hidden_state", "heads that read one hidden state are not supported"
        )
    layer_ids = reader.raw("eagle_aux_hidden_state_layer_ids") or nested.get(
        "eagle_aux_hidden_state_layer_ids"
    )
    taps = _taps(layer_ids, reader, target)
    if reader.integer("num_aux_hidden_states", default=len(taps)) != len(taps):
        raise reader.bad("num_aux_hidden_states", f"it must be {len(taps)}, as many as layer ids")
    own_width = target.hidden_size
    _same_width(
        reader,
        "target_hidden_size",
        reader.integer("target_hidden_size", default=own_width),
        target,
    )
    norm_before_residual = reader.boolean("norm_before_residual", default=False)
    recycles_normed = reader.boolean("norm_output", default=False)
    tap_norms: tuple[str, ...] = ()
    if inner.boolean("norm_before_fc", default=False):
        tap_norms = ("model.input_norm",)
    elif reader.boolean("fc_norm", default=False):
        tap_norms = tuple(f"model.fc_norm.{i}" for i in range(len(taps)))
    draft_vocab = reader.integer("draft_vocab_size", default=target.vocab_size)
    for field in ("target_model_type", "modal_type", "fc_norm"):
        reader.raw(field)
    spec = _layer_spec(config, reader, target)
    has_head = "lm_head.weight" in names
    if draft_vocab != target.vocab_size and not ({"d2t", "lm_head.weight"} <= names):
        raise CheckpointError(
            f"config.json: draft_vocab_size is {draft_vocab}, but the checkpoint lacks tensor d2t or "
            "lm_head.weight, which a vocabulary of its own needs; download the head again"
        )
    if spec.hidden_size != target.hidden_size and not (
        {"embed_tokens.weight", "lm_head.weight"} <= names
    ):
        raise CheckpointError(
            f"config.json: hidden_size is {spec.hidden_size}, the target's {target.hidden_size}: then the "
            "head needs tensors embed_tokens.weight and lm_head.weight of its own; download it again"
        )
    layer = spec.layers[0]
    return HeadSpec(
        method="eagle3",
        target=target,
        layer=replace(layer, attention=replace(layer.attention, fused_input=True)),
        norm=spec.norm,
        rope=spec.ropes[0],
        hidden_size=spec.hidden_size,
        names=EAGLE3,
        taps=taps,
        recycles_normed=recycles_normed,
        norm_before_residual=norm_before_residual,
        tap_norms=tap_norms,
        join_bias="fc.bias" in names,
        draft_vocab_size=draft_vocab if has_head else None,
        has_offsets=has_head and "d2t" in names,
        has_embedding="embed_tokens.weight" in names,
        quantization=spec.quantization,
    )


def _same_width(reader: ConfigReader, field: str, width: int, target: ModelSpec) -> None:
    if width != target.hidden_size:
        rule = f"the target's hidden_size is {target.hidden_size}; the head is for another model"
        raise reader.bad(field, rule)


def _taps(layer_ids: object, reader: ConfigReader, target: ModelSpec) -> tuple[int, ...]:
    """Layers whose input the head reads, ascending.

    Files number them in two ways. If the first is 1, they mean the results of these layers: no head reads
    the input of layer 1 (SGLang #25454). Else they mean the layers' inputs, as vLLM reads all files.
    """
    count, field = target.num_layers, "eagle_aux_hidden_state_layer_ids"
    if not layer_ids:
        layer_ids = [2, count // 2, count - 3]
    is_list = isinstance(layer_ids, list) and all(type(each) is int for each in layer_ids)
    ids = sorted(set(layer_ids)) if is_list else [-1]  # type: ignore[call-overload]
    shift = 1 if ids[0] == 1 else 0
    taps = tuple(each + shift for each in ids)
    if taps[0] < 0 or taps[-1] > count or len(taps) != len(layer_ids):  # type: ignore[arg-type]
        raise unsupported(
            field,
            layer_ids,
            rule=f"it must be different numbers from 0 to {count}, the target's layers",
            remedy="use a head that was made for this model",
        )
    return taps
