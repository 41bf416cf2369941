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

MODEL_TYPES = ("llama", "qwen3", "mistral", "qwen2")
"""Families of layers that a head may have."""
EMBEDDING_SAMPLE = 1 << 20
"""Bytes."""
SPECULATORS_FIELDS = frozenset(
    "architectures auto_map base_model_ep_plan dtype torch_dtype embed_requires_grad has_no_defaults_at_init "
    "speculators_config speculators_model_type speculators_version tie_word_embeddings "
    "transformer_layer_config transformers_version".split()
)
"""Fields of the speculators format that are read, or do not change what a head computes."""


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


EAGLE = HeadNames(layer="model.layers.0", join="model.fc")
EAGLE3 = replace(
    EAGLE,
    embedding_norm="model.layers.0.input_layernorm",
    state_norm="model.layers.0.hidden_norm",
    final_norm="model.norm",
)
MTP_NAMES = {
    # product that joins: norms of embedding and state, and before the output head
    "input_proj": ("token_layernorm", "hidden_layernorm", "final_layernorm"),  # MiMo
    "eh_proj": ("enorm", "hnorm", "shared_head.norm"),  # DeepSeek-V3, GLM-4.5
}


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
        parts = (LinearPart("lm_head", self.draft_vocab_size),)
        return LinearShape(self.hidden_size, parts, bias=False)

    @property
    def norms(self) -> dict[str, int]:
        """Sizes of the norms, by name."""
        names = self.names
        own = (names.embedding_norm, names.state_norm, names.input_norm, names.final_norm)
        width = len(self.taps) * self.target.hidden_size
        taps = dict.fromkeys(self.tap_norms, width // max(1, len(self.tap_norms)))
        return dict.fromkeys(filter(None, (*own, names.mlp_norm)), self.hidden_size) | taps

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

    @property
    def copied_linears(self) -> list[LinearShape]:
        """Products that it reads of the target: of these it has copies if the target is divided among
        ranks."""
        target = self.target
        found = []
        if self.draft_vocab_size is None or (target.tie_word_embeddings and not self.has_embedding):
            found.append(target.head)
        if not self.has_embedding and target.embedding is not None:
            found.append(target.embedding)
        return found

    @property
    def copies_rows(self) -> bool:
        """Whether it reads the target's embedding, which is no product: the same."""
        is_product = self.target.tie_word_embeddings or self.target.embedding is not None
        return not self.has_embedding and not is_product

    def copied_bytes(self, dtype_bytes: int) -> int:
        target = self.target
        rows = target.vocab_size * target.hidden_size if self.copies_rows else 0
        method = target.quantization
        linears = sum(method.weight_bytes(each, dtype_bytes) for each in self.copied_linears)
        return linears + rows * dtype_bytes

    def select(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The head's tensors among a checkpoint's, under the names that `names` has."""
        if self.method == "mtp":  # its embedding and head are copies of the target's
            unused = tuple(
                f"{self.names.layer}.{n}" for n in ("embed_tokens.", "shared_head.head.")
            )
            own = f"{self.names.layer}."
            return {
                n: i for n, i in tensors.items() if n.startswith(own) and not n.startswith(unused)
            }
        unused = ("t2d",) if self.has_embedding else ("t2d", "embed_tokens.weight")
        found = {_own_name(name): info for name, info in tensors.items()}
        return {n: i for n, i in found.items() if n.removeprefix("model.") not in unused}


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
    with source.open() as checkpoint, target_source.open() as other:
        names = {_own_name(name).removeprefix("model.") for name in checkpoint.tensors}
        spec = read(config, names, target)
        if spec.has_embedding and _same_embedding(checkpoint, other):
            spec = replace(spec, has_embedding=False)
    return spec


def _same_embedding(*checkpoints: Checkpoint) -> bool:
    """Whether both begin with the same bytes: EAGLE's files hold a copy of the target's."""
    found: list[object] = []
    for each in checkpoints:
        infos = [
            info for name, info in each.tensors.items() if name.endswith("embed_tokens.weight")
        ]
        if len(infos) != 1:
            return False
        data = bytearray(min(infos[0].num_bytes, EMBEDDING_SAMPLE))
        each.read(infos[0], 0, memoryview(data))
        found.append((infos[0].dtype, infos[0].shape, data))
    return found[0] == found[1]


# --- MTP --------------------------------------------------------------------------------------------------


def draft_tensors(target: ModelSpec) -> re.Pattern[str] | None:
    """Names of a target's tensors that belong to its MTP layers, if it has any."""
    first, count = target.num_layers, target.num_draft_layers
    numbers = "|".join(str(first + i) for i in range(count))
    return re.compile(rf"(^|\.)(mtp_layers\.\d+|layers\.({numbers}))\.") if count else None


def _resolve_mtp(target: ModelSpec, tensors: Mapping[str, TensorInfo]) -> HeadSpec:
    """The first of several layers drafts all tokens."""
    prefixes = "model.mtp_layers.0", f"model.layers.{target.num_layers}"
    places = [(prefix, join) for join in MTP_NAMES for prefix in prefixes]
    found = [(prefix, join) for prefix, join in places if f"{prefix}.{join}.weight" in tensors]
    if not target.num_draft_layers or not found:
        raise UnsupportedModelError(
            "method mtp needs layers for multi-token prediction, and this model's checkpoint has none that "
            f"Quire knows (config.json: num_nextn_predict_layers is {target.num_draft_layers}; tensors: none "
            f"of {', '.join('.'.join(place) for place in places)}); use method suffix or eagle3"
        )
    prefix, join = found[0]
    embedding_norm, state_norm, final_norm = (f"{prefix}.{name}" for name in MTP_NAMES[join])
    layer = target.layers[-1]
    # MiMo's layer has hidden states first, and reads and makes them before a norm: exllamav3 #238.
    is_mimo = join == "input_proj"
    return HeadSpec(
        method="mtp",
        target=target,
        layer=layer,
        norm=target.norm,
        rope=target.ropes[layer.attention.rope or 0],
        hidden_size=target.hidden_size,
        names=HeadNames(
            layer=prefix,
            join=f"{prefix}.{join}",
            embedding_norm=embedding_norm,
            state_norm=state_norm,
            input_norm=f"{prefix}.input_layernorm",
            final_norm=final_norm,
        ),
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
    if reader.text("speculators_model_type", default="") != method:
        raise reader.bad("speculators_model_type", f"with method {method!r} it must be the same")
    layer = reader.mapping("transformer_layer_config")
    if layer is None:
        raise reader.bad("transformer_layer_config", "it must be an object")
    others = {field: value for field, value in config.items() if field not in SPECULATORS_FIELDS}
    return {
        **layer,
        "norm_before_residual": True,
        **others,
    }  # the trainer's default, not that of flat files


def _base(reader: ConfigReader, config: Mapping[str, object], target: ModelSpec) -> HeadSpec:
    """The head's layer, by its family. reader: has read the fields of config that only heads have."""
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
    return HeadSpec(
        method="eagle",
        target=target,
        layer=spec.layers[0],
        norm=spec.norm,
        rope=spec.ropes[0],
        hidden_size=spec.hidden_size,
        names=EAGLE,
        taps=(target.num_layers,),
        quantization=spec.quantization,
    )


def _check_width(reader: ConfigReader, field: str, width: int, target: ModelSpec) -> None:
    if width != target.hidden_size:
        rule = f"the target's hidden_size is {target.hidden_size}; the head is for another model"
        raise reader.bad(field, rule)


def _resolve_eagle(config: Mapping[str, object], names: set[str], target: ModelSpec) -> HeadSpec:
    reader = ConfigReader(config)
    reader.raw("bias")  # seen from the tensors
    if reader.integer("draft_vocab_size", default=target.vocab_size) != target.vocab_size:
        raise reader.bad("draft_vocab_size", "with method 'eagle' it is vocab_size; try eagle3")
    base = _base(reader, config, target)
    _check_width(reader, "hidden_size", base.hidden_size, target)
    norm = "layers.0.input_layernorm"
    has_norm = f"{norm}.weight" in names
    return replace(
        base,
        names=replace(EAGLE, input_norm=f"model.{norm}" if has_norm else None),
        reads_normed=True,
        join_bias="fc.bias" in names,
        has_embedding="embed_tokens.weight" in names,
    )


def _resolve_eagle3(config: Mapping[str, object], names: set[str], target: ModelSpec) -> HeadSpec:
    reader = ConfigReader(config)
    nested = reader.mapping("eagle_config") or {}
    inner = ConfigReader(
        {"norm_before_fc": reader.raw("norm_before_fc"), **nested}, prefix="eagle_config."
    )
    if not inner.boolean("use_aux_hidden_state", default=True):
        raise inner.bad(
            "use_aux_hidden_state", "heads that read one hidden state are not supported"
        )
    field = "eagle_aux_hidden_state_layer_ids"
    taps = _taps(field, reader.raw(field) or nested.get(field), target)
    if reader.integer("num_aux_hidden_states", default=len(taps)) != len(taps):
        raise reader.bad("num_aux_hidden_states", f"it must be {len(taps)}, as many as layer ids")
    width = reader.integer("target_hidden_size", default=target.hidden_size)
    _check_width(reader, "target_hidden_size", width, target)
    tap_norms: tuple[str, ...] = ()
    if reader.boolean("fc_norm", default=False):
        tap_norms = tuple(f"model.fc_norm.{i}" for i in range(len(taps)))
    if inner.boolean("norm_before_fc", default=False):
        tap_norms = ("model.input_norm",)
    vocab_size = reader.integer("draft_vocab_size", default=target.vocab_size)
    before = reader.boolean("norm_before_residual", default=False)
    recycles_normed = reader.boolean("norm_output", default=False)
    for unused in ("target_model_type", "modal_type"):
        reader.raw(unused)
    base = _base(reader, config, target)
    needed = {"d2t", "lm_head.weight"} if vocab_size != target.vocab_size else set()
    if base.hidden_size != target.hidden_size:
        needed |= {"embed_tokens.weight", "lm_head.weight"}
    if missing := sorted(needed - names):
        raise CheckpointError(
            f"the checkpoint lacks tensor {missing[0]}, which a head with hidden_size {base.hidden_size} and "
            f"draft_vocab_size {vocab_size} needs for a model with {target.hidden_size} and "
            f"{target.vocab_size}; download it again"
        )
    has_head, layer = "lm_head.weight" in names, base.layer
    return replace(
        base,
        method="eagle3",
        layer=replace(layer, attention=replace(layer.attention, fused_input=True)),
        names=EAGLE3,
        taps=taps,
        recycles_normed=recycles_normed,
        norm_before_residual=before,
        tap_norms=tap_norms,
        join_bias="fc.bias" in names,
        draft_vocab_size=vocab_size if has_head else None,
        has_offsets=has_head and "d2t" in names,
        has_embedding="embed_tokens.weight" in names,
    )


def _taps(field: str, layer_ids: object, target: ModelSpec) -> tuple[int, ...]:
    """Layers whose input the head reads, ascending.

    Files number them in two ways. If the first is 1, they mean the results of these layers: no head reads
    the input of layer 1 (SGLang #25454). Else they mean the layers' inputs, as vLLM reads all files.
    """
    count = target.num_layers
    given = layer_ids or [2, count // 2, count - 3]
    ids = sorted(each for each in given if type(each) is int) if isinstance(given, list) else []
    shift = 1 if ids[:1] == [1] else 0
    taps = tuple(each + shift for each in ids)
    is_whole = isinstance(given, list) and len(set(ids)) == len(given)
    if not is_whole or taps[0] < 0 or taps[-1] > count:
        raise unsupported(
            field,
            given,
            rule=f"it must be different numbers from 0 to {count}, the target's layers",
            remedy="use a head that was made for this model",
        )
    return taps
