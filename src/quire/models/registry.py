"""From the architecture a checkpoint names to the file that understands it, imported only when asked for.

Adding a family is one file with a `resolve(config) -> ModelSpec` and one line here. Nothing in this
module or in a family's file imports torch: the HTTP front end resolves specs too.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

from quire.errors import UnsupportedModelError
from quire.models.fields import ConfigReader
from quire.models.spec import ModelSpec

FAMILIES: Mapping[str, str] = {
    "LlamaForCausalLM": "quire.models.llama",
    "MistralForCausalLM": "quire.models.mistral",
    "Qwen2ForCausalLM": "quire.models.qwen2",
    "Qwen3ForCausalLM": "quire.models.qwen3",
}
BASE_MODELS: Mapping[str, str] = {
    "LlamaModel": "LlamaForCausalLM",
    "MistralModel": "MistralForCausalLM",
    "Qwen2Model": "Qwen2ForCausalLM",
    "Qwen3Model": "Qwen3ForCausalLM",
}
"""What `AutoModel` saves: the same model, named without its head."""
MODEL_TYPES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""What decides, as in transformers, where a config names no architecture."""


def resolve_spec(hf_config: Mapping[str, object]) -> ModelSpec:
    """Check a parsed `config.json` (with any overrides applied) and reduce it to a `ModelSpec`.

    Raises:
        UnsupportedModelError: for an architecture, field or value that is not implemented; names
            the field, its value and the remedy. Raised before any weight is read.
    """
    family: ModuleType = importlib.import_module(FAMILIES[_architecture(hf_config)])
    spec = family.resolve(hf_config)
    assert isinstance(spec, ModelSpec)
    return spec


def _architecture(hf_config: Mapping[str, object]) -> str:
    reader = ConfigReader(hf_config)
    names = reader.names("architectures") or ()
    supported = ", ".join(sorted(FAMILIES))
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
    name = BASE_MODELS.get(names[0], names[0])
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"config.json: architectures names {names[0]!r}, which Quire does not implement; "
            f"supported architectures are {supported}"
        )
    return name
