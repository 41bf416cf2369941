"""LoRA adapters of random weights, for a model in a directory whose attention has q_proj and v_proj."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

RANK = 4
NAMES = tuple(f"adapter-{number}" for number in range(6))
"""More than are in memory at once."""
SCALE = 0.05


def write_adapters(model: Path, folder: Path, seed: int) -> str:
    """One directory per name. Returns why there are none; empty: they are written."""
    try:
        config = json.loads((model / "config.json").read_text("utf-8"))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        width = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        outputs = {"q_proj": heads * width, "v_proj": kv_heads * width}
        layers = config["num_hidden_layers"]
    except (OSError, ValueError, KeyError, TypeError):
        return "adapters are made for the built-in model, or one in a directory"
    draw = np.random.default_rng(seed)
    for name in NAMES:
        tensors = {}
        for layer in range(layers):
            for part, size in outputs.items():
                place = f"base_model.model.model.layers.{layer}.self_attn.{part}"
                tensors[f"{place}.lora_A.weight"] = draw.normal(0, SCALE, (RANK, hidden))
                tensors[f"{place}.lora_B.weight"] = draw.normal(0, SCALE, (size, RANK))
        _write(folder / name, tensors, sorted(outputs))
    return ""


def _write(folder: Path, tensors: dict[str, np.ndarray], targets: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(
        json.dumps(about | {"task_type": "CAUSAL_LM"}), "utf-8"
    )
    head: dict[str, object] = {}
    data = bytearray()
    for name, values in tensors.items():
        content = values.astype("<f4").tobytes()
        place = [len(data), len(data) + len(content)]
        head[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": place}
        data += content
    text = json.dumps(head).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
