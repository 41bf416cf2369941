"""Maps the names in a file to the names in a model.

One architecture is published with several prefixes: `AutoModel` saves a base model without `model.`,
training frameworks wrap a model and save the wrapper's name too (`module.`, `_orig_mod.`), and
vision-language models contain a whole text model (`language_model.model.`, `model.language_model.`).
transformers decides for each tensor; here one prefix is used for the whole file, the one under which all
of the model's tensors are. So a file with two models, or parts of two, is an error and not a mixture.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping

from quire.errors import CheckpointError
from quire.weights.source import TensorInfo

logger = logging.getLogger(__name__)

TRUNK = "model."
"""Prefix of all names in our models, except the output head's."""
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens"
MOST_NAMES = 4

BUFFERS = re.compile(
    r"(^|\.)("
    r"rotary_(pos_)?emb\.\w+|rotary_emb_\w+|inv_freq|cos_cached|sin_cached|freqs_cis|masked_bias|"
    r"position_ids|embed_positions(\.\w+)?|causal_mask|attention_mask|token_type_ids|_extra_state|"
    r"num_batches_tracked"
    r")$"
)
"""Tensors that can be computed from the config, saved by older versions of a library."""
MASKS = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")
"""A causal mask as in GPT-2. It is [1, 1, n, n]; a learned bias has one dimension."""
ADAPTERS = re.compile(
    r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_l|hada_w\w+|lokr_w\w+|oft_[rR]|vera_lambda_\w|"
    r"prompt_embeddings)(\.|$)"
)
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|biases|g_idx|absmax|quant_map|quant_state\..+|nested_absmax|nested_quant_map|"
    r"SCB|weight_(scale\w*|zero_point|packed|shape|format|g_idx)|(input|output|activation|[kv]|kv)_scale)$"
)
TOWERS = re.compile(
    r"(^|\.)(mtp|vision\w*|visual|image_\w+|multi_modal_\w+|multimodal_\w+|mm_\w+|audio\w*|speech_\w+|"
    r"embed_(vision|audio))(\.|$)"
)
"""Vision and audio parts of a multimodal model, and layers that draft tokens: a text model does not use
them."""


TEXT = re.compile(r"(?:^|\.)((?:layers\.\d+|embed_tokens|lm_head)\..+)$")
KV_SCALES = re.compile(
    r"\.(self_attn\.|attn\.)?([qkv]_scale|kv_scale|prob_scale|(q_proj|k_proj|v_proj)\.(output_scale|k_scale|v_scale))$"
)
"""Of the KV cache and of attention's products, in some quantized checkpoints."""


def map_names(tensors: Mapping[str, TensorInfo], wanted: Collection[str]) -> dict[str, TensorInfo]:
    """The file's tensors under the model's names, without those that no model needs.

    A tensor that the model does not have keeps its own name. wanted: all names in the model.

    Raises:
        CheckpointError: for an adapter, a quantized checkpoint, or a file that holds the model's tensors
            under two prefixes; names a tensor of each.
    """
    kept = {name: info for name, info in tensors.items() if not _is_buffer(name, info)}
    _refuse_adapters(kept)
    trunk = {name.removeprefix(TRUNK) for name in wanted if name.startswith(TRUNK)}
    prefix = _prefix(kept, trunk)
    if prefix is None:
        _refuse_quantized([name for name in kept if name not in wanted])
        return kept
    renamed = {
        name: TRUNK + name[len(prefix) :]
        for name in kept
        if name.startswith(prefix) and name[len(prefix) :] in trunk
    }
    for target in wanted:
        if not target.startswith(TRUNK) and (head := _head(kept, prefix, target)) is not None:
            renamed[head] = target
    _refuse_quantized([name for name in kept if name not in renamed and not TOWERS.search(name)])
    if prefix != TRUNK:
        logger.info("the checkpoint's names begin with %r, read as %r", prefix, TRUNK)
    mapped: dict[str, TensorInfo] = {}
    origin: dict[str, str] = {}
    left_out = []
    for name, info in kept.items():
        target = renamed.get(name, name)
        if name not in renamed and KV_SCALES.search(name):
            continue
        if name not in renamed and TOWERS.search(name):
            left_out.append(name)
            continue
        if target in origin:
            raise _two_sides(origin[target], name)
        mapped[target], origin[target] = info, name
    if left_out:
        logger.info("left out %s: Quire serves the text model only", list_names(left_out))
    return mapped


def text_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of a text model's tensors, under the names in our models."""
    found = {}
    for name, info in tensors.items():
        match = None if TOWERS.search(name) else TEXT.search(name)
        if match is not None:
            target = match[1] if match[1].startswith("lm_head.") else TRUNK + match[1]
            found[target] = (info.dtype, info.shape)
    return found


def _is_buffer(name: str, info: TensorInfo) -> bool:
    if MASKS.search(name):
        return len(info.shape) != 1
    return BUFFERS.search(name) is not None


def _refuse_adapters(tensors: Collection[str]) -> None:
    if adapter := [name for name in tensors if ADAPTERS.search(name)]:
        raise CheckpointError(
            f"the checkpoint has {list_names(adapter)}: it is an adapter, or a model with one that is not "
            "merged; merge it (PeftModel.merge_and_unload()), or serve an adapter with --lora-modules"
        )


def _refuse_quantized(tensors: Collection[str]) -> None:
    """tensors: those that the model does not have."""
    if quantized := [n for n in tensors if QUANTIZED.search(n) and not KV_SCALES.search(n)]:
        raise CheckpointError(
            f"the checkpoint has {list_names(quantized)}: it is quantized, and not in a way that its config "
            "says and Quire supports; use the model's unquantized checkpoint"
        )


def _prefix(tensors: Collection[str], trunk: Collection[str]) -> str | None:
    """The prefix under which all names of the trunk are or, if there is none, the one with most of them.
    None if no name matches."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        start = 0
        while start >= 0:
            if name[start:] in trunk:
                found.setdefault(name[:start], set()).add(name[start:])
            start = name.find(".", start) + 1 or -1
    if not found:
        return None
    best = max(found, key=lambda prefix: (len(found[prefix]), prefix == TRUNK))
    missing = set(trunk) - found[best]
    for other, names in found.items():
        if other == best or TOWERS.search(other):
            continue
        if names == found[best] or names & missing:
            name = min(names & missing or names)
            raise _two_sides(best + min(found[best]), other + name)
    return best


def _head(tensors: Collection[str], prefix: str, head: str) -> str | None:
    """The name of a tensor of the output head in the file: beside the trunk, or beside the module that
    wraps the trunk."""
    steps = [0, *(match.end() for match in re.finditer(r"\.", prefix))]
    found = [name for step in steps if (name := prefix[:step] + head) in tensors]
    if len(found) > 1:
        raise _two_sides(*found[:2])
    return found[0] if found else None


def _two_sides(one: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint holds tensors of this model under two names, like {one} and {other}; it is not "
        "clear which belong together. Save it again with one naming, or remove the other model's tensors"
    )


def list_names(names: Collection[str]) -> str:
    """For messages: "tensor a, b, c, d and 5 more"."""
    shown = ", ".join(list(names)[:MOST_NAMES])
    more = len(names) - MOST_NAMES
    return f"tensor {shown}" + (f" and {more} more" if more > 0 else "")
