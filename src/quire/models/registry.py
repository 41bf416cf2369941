"""From the architecture a checkpoint names to the file that understands it, imported only when asked for.

Adding a family is one file with a `resolve(config, architecture) -> ModelSpec` and a line in each table here.
Nothing in this module or in a family's file imports torch: the HTTP front end resolves specs too.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

from quire.errors import UnsupportedModelError
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec

FAMILIES: Mapping[str, str] = {
    "Gemma2ForCausalLM": "quire.models.gemma",
    "Gemma3ForCausalLM": "quire.models.gemma",
    "GraniteForCausalLM": "quire.models.granite",
    "LlamaForCausalLM": "quire.models.llama",
    "Ministral3ForCausalLM": "quire.models.ministral3",
    "MiMoForCausalLM": "quire.models.mimo",
    "MistralForCausalLM": "quire.models.mistral",
    "Olmo2ForCausalLM": "quire.models.olmo",
    "Olmo3ForCausalLM": "quire.models.olmo",
    "Phi3ForCausalLM": "quire.models.phi3",
    "Qwen2ForCausalLM": "quire.models.qwen2",
    "Qwen3ForCausalLM": "quire.models.qwen3",
    "SmolLM3ForCausalLM": "quire.models.smollm3",
}
MODEL_TYPES: Mapping[str, str] = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mimo": "MiMoForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""What decides, as in transformers, where a config names no architecture."""
MULTIMODAL: Mapping[str, str] = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Mistral3ForConditionalGeneration": "mistral",
}
"""Models of which the text part is served, and the model_type of one whose `text_config` names none."""
MULTIMODAL_FIELDS = frozenset(
    "architectures model_type text_config vision_config boi_token_index eoi_token_index image_token_index "
    "image_token_id boi_token_id eoi_token_id mm_tokens_per_image vision_feature_layer spatial_merge_size "
    "projector_hidden_act multimodal_projector_bias".split()
)
"""Fields around `text_config` that are not the text model's."""


def text_config(hf_config: Mapping[str, object]) -> Mapping[str, object]:
    """The text model's config: `hf_config` itself, or that inside a multimodal one.

    A field beside `text_config` (a dtype, the ends, whether embeddings are tied, an override) counts before
    the one inside.
    """
    reader = ConfigReader(hf_config)
    names = reader.names("architectures") or ()
    if len(names) != 1 or names[0] not in MULTIMODAL:
        return hf_config
    inner = reader.mapping("text_config") or {}
    outer = {k: value for k, value in hf_config.items() if k not in MULTIMODAL_FIELDS}
    return {"model_type": MULTIMODAL[names[0]], **inner, "architectures": None, **outer}


def resolve_spec(hf_config: Mapping[str, object]) -> ModelSpec:
    """Check a parsed `config.json` (with any overrides applied) and reduce it to a `ModelSpec`.

    Raises:
        UnsupportedModelError: for an architecture, field or value that is not implemented; names
            the field, its value and the remedy. Raised before any weight is read.
    """
    config = text_config(hf_config)
    architecture = _architecture(config)
    family: ModuleType = importlib.import_module(FAMILIES[architecture])
    spec = family.resolve(config, architecture)
    assert isinstance(spec, ModelSpec)
    return spec


def _architecture(hf_config: Mapping[str, object]) -> str:
    reader = ConfigReader(hf_config)
    names = reader.names("architectures") or ()
    supported = ", ".join(sorted({*FAMILIES, *MULTIMODAL}))
    if not names:
        model_type = reader.text("model_type", default="")
        if model_type in MODEL_TYPES:
            return MODEL_TYPES[model_type]
        raise reader.bad(
            "model_type",
            f"without architectures it must be one of {', '.join(sorted(MODEL_TYPES))}",
        )
    if len(names) != 1:
        rule = f"it must name exactly one architecture, one of {supported}"
        raise reader.bad("architectures", rule)
    name = names[0]
    if name.endswith("Model"):  # what `AutoModel` saves: the same model, named without its head
        name = name.removesuffix("Model").removesuffix("Text") + "ForCausalLM"
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"config.json: architectures names {names[0]!r}, which Quire does not implement; "
            f"supported architectures are {supported}"
        )
    return name
