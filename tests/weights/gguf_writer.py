"""Writes GGUF files, and converts checkpoints to them as llama.cpp's converter does."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file

from quire.weights.gguf_header import TYPE_NAMES

TYPES = {name: number for number, name in TYPE_NAMES.items()}
Stored = tuple[str, tuple[int, ...], bytes]
"""Type, shape with outputs first, bytes."""


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: object) -> tuple[int, bytes]:
    """The number of the value's type, and its bytes."""
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return 8, text(value)
        case list():
            items = [(5, struct.pack("<i", v)) if type(v) is int else typed(v) for v in value]
            kind = items[0][0] if items else 5
            return 9, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)
    raise TypeError(value)


def encode(
    metadata: Mapping[str, object], tensors: Mapping[str, Stored], *, version: int = 3
) -> bytes:
    alignment = metadata.get("general.alignment", 32)
    alignment = alignment if isinstance(alignment, int) and alignment > 0 else 32
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = typed(value)
        header += text(key) + struct.pack("<I", kind) + data
    body = b""
    for name, (kind_name, shape, data) in tensors.items():
        body += bytes(-len(body) % alignment)
        header += text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        header += struct.pack("<IQ", TYPES[kind_name], len(body))
        body += data
    return header + bytes(-len(header) % alignment) + body


def stored(tensor: torch.Tensor, kind: str = "float32") -> Stored:
    """Floats, or quantized to q8_0 or q4_0 by round to nearest."""
    shape = tuple(tensor.shape)
    if kind not in ("q8_0", "q4_0"):
        data = tensor.to(getattr(torch, kind)).contiguous().view(torch.uint8).numpy().tobytes()
        return kind, shape, data
    values = tensor.float().numpy().reshape(*shape[:-1], -1, 32)
    most = 127 if kind == "q8_0" else 7
    scale = (np.abs(values).max(-1, keepdims=True) / most).astype(np.float16)
    codes = np.rint(values / np.maximum(scale.astype(np.float32), 1e-8)).clip(-most, most)
    if kind == "q8_0":
        packed = codes.astype(np.int8).view(np.uint8)
    else:
        nibbles = (codes + 8).astype(np.uint8)
        packed = nibbles[..., :16] | nibbles[..., 16:] << 4
    return kind, shape, np.concatenate((scale.view(np.uint8), packed), -1).tobytes()


ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
}
PERMUTED = ("llama", "granite", "smollm3")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
POST_NORMED = ("gemma2", "gemma3", "olmo2")
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "vocab_size": "vocab_size",
}
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def gguf_name(architecture: str, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, inner = stem.split(".", 3)
        part = NAMES[inner]
        if inner == "post_attention_layernorm" and architecture in POST_NORMED:
            part = "post_attention_norm"
        return f"blk.{index}.{part}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def permuted(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Of each head (0, d/2, 1, d/2 + 1, ...)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def read_metadata(directory: Path) -> dict[str, object]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    name = ARCHITECTURES[config["architectures"][0]]
    keys: dict[str, object] = {k: config[field] for k, field in KEYS.items() if config.get(field)}
    if name == "granite":
        keys |= {key: float(config[field]) for key, field in GRANITE.items()}
    ropes = config.get("rope_parameters") or {}
    full = ropes.get("full_attention", ropes)
    keys["rope.freq_base"] = float(full.get("rope_theta", 10000.0))
    if "sliding_attention" in ropes and name == "gemma3":
        keys["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    keys["rope.dimension_count"] = int(head_dim * full.get("partial_rotary_factor", 1.0))
    kind = full.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys["rope.scaling.type"], keys["rope.scaling.factor"] = kind, float(full["factor"])
    original = full.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    if kind in ("yarn", "longrope") or name == "phi3":
        keys["rope.scaling.original_context_length"] = original or keys["context_length"]
    if kind == "yarn" and "beta_fast" in full:
        keys["rope.scaling.yarn_beta_fast"] = float(full["beta_fast"])
    if kind == "longrope":
        scale = config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        keys["rope.scaling.attn_factor"] = float(full.get("attention_factor", factor))
    if name in ("phi3", "gemma2", "gemma3", "olmo2") and "sliding_window" in config:
        keys["attention.sliding_window"] = config["sliding_window"] or 0
    if config["architectures"] == ["Olmo3ForCausalLM"]:
        pattern = [kind == "sliding_attention" for kind in config["layer_types"]]
        keys["attention.sliding_window_pattern"] = pattern
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(cap):
            keys[cap] = float(config[cap])
    keys = {f"{name}.{key}": value for key, value in keys.items()}
    return {"general.architecture": name, **keys}


def rope_tensors(directory: Path) -> dict[str, Stored]:
    config = json.loads((directory / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    found = {}
    if rope.get("rope_type") == "llama3":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        found["rope_freqs.weight"] = llama3_divisors(rope, head_dim)
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            found[f"rope_factors_{length}.weight"] = torch.tensor(rope[f"{length}_factor"])
    return {name: stored(values) for name, values in found.items()}


def llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    divisors = []
    for i in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] / (
            2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        )
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(divisors)


def convert(
    directory: Path, *, matrices: str = "float32", head: str | None = None
) -> tuple[dict[str, object], dict[str, Stored]]:
    """Metadata and tensors of a checkpoint. matrices, head: their types; head: also of the embedding."""
    metadata = read_metadata(directory)
    name = str(metadata["general.architecture"])
    config = json.loads((directory / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tensors = {}
    for hf, tensor in load_file(directory / "model.safetensors").items():
        target = gguf_name(name, hf)
        if name.startswith("gemma") and hf.endswith("norm.weight"):
            tensor = tensor.float() + 1
        if name in PERMUTED and ("q_proj" in hf or "k_proj" in hf):
            tensor = permuted(tensor, head_dim)
        is_head = target in ("token_embd.weight", "output.weight")
        kind = (head or matrices) if is_head else matrices
        tensors[target] = stored(tensor, kind if tensor.dim() > 1 else "float32")
    return metadata, tensors | rope_tensors(directory)


def tokenizer_metadata(directory: Path, *, pre: str = "gpt-2") -> dict[str, object]:
    """Of a byte-level tokenizer."""
    file = json.loads((directory / "tokenizer.json").read_text())
    backend = tokenizers.Tokenizer.from_str(json.dumps(file))
    added = backend.get_added_tokens_decoder()
    vocab = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    kinds = [1 if i not in added else 3 if added[i].special else 4 for _, i in vocab]
    merges = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in file["model"]["merges"]
    ]
    assert [i for _, i in vocab] == list(range(len(vocab)))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


def write_gguf(
    path: Path, metadata: Mapping[str, object], tensors: Mapping[str, Stored], *, shards: int = 1
) -> Path:
    """The path of the file, or of the first shard."""
    if shards == 1:
        path.write_bytes(encode(metadata, tensors))
        return path
    names: Sequence[str] = list(tensors)
    for number in range(shards):
        split = {"split.no": number, "split.count": shards, "split.tensors.count": len(tensors)}
        part = {name: tensors[name] for name in names[number::shards]}
        file = path.with_name(f"{path.stem}-{number + 1:05}-of-{shards:05}.gguf")
        file.write_bytes(encode({**split, **(metadata if number == 0 else {})}, part))
    return path.with_name(f"{path.stem}-00001-of-{shards:05}.gguf")
