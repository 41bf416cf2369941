"""Adapters that PEFT itself has made, against PEFT: of every kind of target and option, merged and not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.kernels.base import Kernels
from tests.models.conftest import Pair
from tests.models.harness import Request
from tests.models.test_lora import harness, load
from tests.models.variants import build_reference, prompt_tokens, reference_logits

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
NAMES = [
    "llama-mha-tied", "mistral-window", "qwen2", "qwen3-windows-bias", "gemma2-untied-bias", "gemma3",
    "olmo2", "phi3", "granite", "smollm3", "ministral3", "gemma3-multimodal", "ministral3-multimodal-tied",
]  # fmt: skip


def random_config(chooser: random.Random, name: str) -> dict[str, Any]:
    targets = chooser.sample(
        every := FUSED if "phi3" in name else TARGETS, chooser.randint(1, len(every))
    )
    config: dict[str, Any] = {
        "r": chooser.choice([1, 3, 8, 16, 29]),
        "lora_alpha": chooser.choice([1, 8, 20, 32]),
        "use_rslora": chooser.random() < 0.3,
        "target_modules": targets,
        "exclude_modules": r".*(vision_tower|multi_modal_projector).*",
        "lora_dropout": 0.3,
    }
    kind = chooser.choice(["all-linear", "regex", "layers", "list", "patterns", "embedding"])
    if kind == "all-linear":
        config["target_modules"] = "all-linear"
    elif kind == "regex":
        config["target_modules"] = rf".*text.*|model\.layers\.1\..*({'|'.join(targets)})"
        if "multimodal" in name:
            config["target_modules"] = rf".*language_model\.layers\.1\..*({'|'.join(targets)})"
    elif kind == "layers":
        config |= {"layers_to_transform": [0], "layers_pattern": "layers"}
    elif kind == "patterns":
        block = "self_attn" if targets[0] in (*TARGETS[:4], "qkv_proj") else "mlp"
        config["rank_pattern"] = {f"layers.*{targets[0]}": 5}
        config["alpha_pattern"] = {f"{block}.{targets[0]}": 3, f"layers.0.{block}.{targets[0]}": 40}
    elif kind == "embedding":
        config["target_modules"] += chooser.sample(
            ["embed_tokens", "lm_head"], chooser.randint(1, 2)
        )
    if kind != "embedding":
        config["use_dora"] = chooser.random() < 0.4
    return config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernels", ["native"], indirect=True)
def test_logits_equal_peft(
    name: str, seed: int, pair: Callable[..., Pair], kernels: Kernels, tmp_path: Path
) -> None:
    _, model = pair(name, kernels)
    config = random_config(random.Random(f"{name}{seed}"), name)
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(build_reference(name), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "lora_" in parameter_name and "magnitude" not in parameter_name:
                parameter.normal_(0.0, 0.08)
            elif "magnitude" in parameter_name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    theirs.save_pretrained(tmp_path)
    # Read again, since saving sorts the patterns, of which the first one wins.
    theirs = peft.PeftModel.from_pretrained(build_reference(name), tmp_path).eval()
    tokens = prompt_tokens(25, seed=seed)
    ours = harness(model, load(model, tmp_path)).prefill(Request(tokens, adapter=0), chunk=9)
    expected = [reference_logits(theirs, tokens)]
    if not model.spec.tie_word_embeddings or not {"lm_head", "embed_tokens"} & {
        *config["target_modules"]
    }:  # PEFT would merge into both uses of a tied matrix
        expected.append(reference_logits(theirs.merge_and_unload(), tokens))
    for logits in expected:
        largest = float(logits.abs().max())
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * largest)
