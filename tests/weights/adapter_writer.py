"""Random LoRA adapters in PEFT's layout, and the models that they are meant to give."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.models.spec import ModelSpec
from quire.weights.adapter import sites
from quire.weights.names import EMBEDDING

CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "target_modules": ["q_proj"],
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}
PREFIX = "base_model.model."


def matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every matrix that an adapter may change, by its name in our models."""
    return {
        part.name: (part.out_features, shape.in_features)
        for shape in sites(spec)
        for part in shape.parts
    }


def write_adapter(
    directory: Path,
    spec: ModelSpec,
    targets: Iterable[str],
    *,
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    change: Mapping[str, Tensor | None] | None = None,
    **config: Any,
) -> Path:
    """targets: ends of names, as "q_proj" or "layers.1.self_attn.q_proj". ranks: by such an end. change:
    tensors to add, or to leave out (None), by their names in the file. The names in the file are a text
    model's."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.12).to(dtype)

    tensors: dict[str, Tensor] = {}
    wanted = tuple(targets)
    for name, (outputs, inputs) in matrices(spec).items():
        if not name.endswith(wanted):
            continue
        r = next((value for key, value in (ranks or {}).items() if name.endswith(key)), rank)
        if name == EMBEDDING:
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = random(r, inputs)
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = random(outputs, r)
            continue
        tensors[f"{PREFIX}{name}.lora_A.weight"] = random(r, inputs)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = random(outputs, r)
        if config.get("use_dora"):
            magnitude = 0.5 + torch.rand(outputs, generator=generator)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude.to(dtype)
    for name, tensor in (change or {}).items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    fields = {**CONFIG, "r": rank, "target_modules": list(wanted), **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


@torch.no_grad()
def merged(model: transformers.PreTrainedModel, adapter: Path) -> transformers.PreTrainedModel:
    """A copy of the base model in which the weights are what the adapter makes of them: by the definitions,
    from the files, with nothing of Quire's."""
    model = copy.deepcopy(model)
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    embeds = model.get_input_embeddings()
    if model.get_output_embeddings().weight is embeds.weight:  # an adapter changes one of them
        model.get_output_embeddings().weight = torch.nn.Parameter(embeds.weight.clone())
    for name, a in tensors.items():
        if not name.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        module = (
            name.removeprefix(PREFIX).replace(".lora_A.weight", "").replace(".lora_embedding_A", "")
        )
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        alpha = config["lora_alpha"]
        for key, value in config["alpha_pattern"].items():
            if module == key or module.endswith(f".{key}"):
                alpha = value
                break
        rank = a.shape[0]
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        weight = model.get_submodule(module).weight
        delta = scale * (b.double() @ a.double())
        if "embedding" in name:
            weight += delta.T.to(weight.dtype)
            continue
        new = weight.double() + delta
        if config["use_dora"]:
            magnitude = tensors[f"{PREFIX}{module}.lora_magnitude_vector"].double()
            new *= (magnitude / new.norm(dim=1))[:, None]
        weight.copy_(new)
    return model
