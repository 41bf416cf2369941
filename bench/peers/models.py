"""Make the comparison's models: a Hugging Face checkpoint with random weights, and its conversions.

    python -m bench.peers.models checkpoint M2 DIR    (needs transformers and tokenizers)
    python -m bench.peers.models gguf DIR FILE TYPE   (needs gguf and numpy)
    python -m bench.peers.models requantize FILE FILE TYPE   (needs gguf and libgguf)
    python -m bench.peers.models mistralrs DIR FOLDER

Random weights compute exactly what trained ones do, and nothing has to be downloaded. OpenVINO's form is
made from the checkpoint by `optimum-cli` (see `setup`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
from pathlib import Path
from typing import Any

SPECIAL = ("<unk>", "<s>", "</s>")


def checkpoint(name: str, folder: Path) -> None:
    """A bf16 checkpoint of the shape M1 or M2, seeded, with a tokenizer that fits its vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if name == "M2":
        config = LlamaConfig(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=64,
            intermediate_size=2048,
            vocab_size=32000,
            max_position_embeddings=8192,
            **common,
        )
        model = LlamaForCausalLM(config)
    elif name == "M1":
        config = Qwen3Config(
            hidden_size=1024,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
            vocab_size=151936,
            max_position_embeddings=40960,
            **common,
        )
        model = Qwen3ForCausalLM(config)
    else:
        raise SystemExit(f"model must be M1 or M2, got {name!r}.")
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(config.vocab_size).save_pretrained(folder)


def build_tokenizer(vocab_size: int) -> Any:
    """Byte-level BPE without a merge: three special tokens, 256 bytes, then four-letter words.

    Encoding yields bytes only; decoding works for every id, and the text is about as long as a real
    model's. Servers need one even for prompts of token ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(vocabulary(vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def vocabulary(vocab_size: int) -> list[str]:
    """The tokens by id: special ones, GPT-2's 256 byte letters, four-letter words."""
    words = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    head = [*SPECIAL, *_byte_letters()]
    return head + list(itertools.islice(words, vocab_size - len(head)))


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: printable bytes are themselves, others follow 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


# --- GGUF -----------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """A checkpoint's tensor name as llama.cpp spells it."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def gguf(folder: Path, file: Path, dtype: str) -> None:
    """Write `folder`'s checkpoint as one GGUF file: matrices in `dtype` (bf16, f16 or f32), norms in f32."""
    import gguf as lib

    config = json.loads((folder / "config.json").read_text())
    arch = {"llama": "llama", "qwen3": "qwen3"}[config["model_type"]]
    writer = lib.GGUFWriter(str(file), arch)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(
        {
            "bf16": lib.LlamaFileType.MOSTLY_BF16,
            "f16": lib.LlamaFileType.MOSTLY_F16,
            "f32": lib.LlamaFileType.ALL_F32,
        }[dtype]
    )
    tokens = vocabulary(config["vocab_size"])
    kinds = [lib.TokenType.CONTROL] * len(SPECIAL)
    kinds += [lib.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp warns of a BPE vocabulary without a merge; this one is never needed.
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, data in _read_safetensors(folder).items():
        if name == "lm_head.weight":  # tied
            continue
        _add_tensor(writer, name, data, (heads, kv_heads) if arch == "llama" else None, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def requantize(source: Path, target: Path, kind: str) -> None:
    """A GGUF file of floats with its matrices quantized; q4_K_M mixes types as llama-quantize does."""
    import gguf as lib
    import libgguf
    import numpy as np

    reader = lib.GGUFReader(str(source))
    writer = lib.GGUFWriter(str(target), str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == lib.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    layers = 1 + max(int(t.name.split(".")[1]) for t in reader.tensors if t.name.startswith("blk."))
    for tensor in reader.tensors:
        data = lib.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if data.ndim == 1:
            writer.add_tensor(tensor.name, data)
            continue
        chosen = _matrix_type(tensor.name, kind, layers)
        if data.shape[1] % 256:  # no row of K types
            chosen = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}.get(chosen, chosen)
        wanted = lib.GGMLQuantizationType[chosen]
        writer.add_tensor(tensor.name, libgguf.quantize_rows(data, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrix_type(name: str, kind: str, layers: int) -> str:
    """llama-quantize's choice: a tied embedding is the output, and a part of two kinds gets more bits."""
    if name.startswith("token_embd"):
        return "Q8_0" if kind == "q8_0" else "Q6_K"
    if kind != "q4_K_M":
        return kind.upper()
    layer = int(name.split(".")[1])
    is_more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return "Q6_K" if is_more and ("attn_v" in name or "ffn_down" in name) else "Q4_K"


# --- mistral.rs ------------------------------------------------------------------------------------


def mistralrs(folder: Path, target: Path) -> None:
    """The checkpoint as mistral.rs reads it: `rope_theta` at the top of its config, and a tokenizer that

    encodes "300 301" as the ids 300 and 301, for its Python package takes text only.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.name in ("config.json", "tokenizer.json"):
            continue
        link = target / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = _rope_theta(config)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    names = [*SPECIAL, *(str(index) for index in range(len(SPECIAL), config["vocab_size"]))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        # It accepts no tokenizer without a decoder that it knows.
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
        "model": {
            "type": "WordLevel",
            "vocab": {name: index for index, name in enumerate(names)},
            "unk_token": SPECIAL[0],
        },
    }
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))


def _rope_theta(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or config
    return float(rope["rope_theta"])


def _add_tensor(
    writer: Any, name: str, data: Any, heads: tuple[int, int] | None, dtype: str
) -> None:
    """data: uint16 (the bits of bf16). heads: where the rotary halves must be interleaved (Llama)."""
    import gguf as lib
    import numpy as np

    if heads is not None and name.endswith(("q_proj.weight", "k_proj.weight")):
        count = heads[0] if "q_proj" in name else heads[1]
        rows, columns = data.shape
        halves = data.reshape(count, 2, rows // count // 2, columns)
        data = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
    if data.ndim == 1 or dtype != "bf16":
        wide = (data.astype(np.uint32) << 16).view(np.float32)
        narrow = data.ndim > 1 and dtype == "f16"
        writer.add_tensor(gguf_name(name), wide.astype(np.float16) if narrow else wide)
    else:
        # GGUF wants the bytes of types that numpy lacks; the last axis then counts bytes.
        writer.add_tensor(
            gguf_name(name), data.view(np.uint8), raw_dtype=lib.GGMLQuantizationType.BF16
        )


def _read_safetensors(folder: Path) -> dict[str, Any]:
    """Every bf16 tensor as uint16 bits; numpy has no bfloat16, and torch is not needed for this."""
    import numpy as np

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        size = int.from_bytes(file.open("rb").read(8), "little")
        raw = np.memmap(file, dtype=np.uint8, mode="r")
        header = json.loads(bytes(raw[8 : 8 + size]))
        header.pop("__metadata__", None)
        for name, info in header.items():
            if info["dtype"] != "BF16":
                raise SystemExit(f"{name} is {info['dtype']}; only BF16 checkpoints are converted.")
            start, end = info["data_offsets"]
            bits = np.frombuffer(raw[8 + size + start : 8 + size + end].tobytes(), dtype=np.uint16)
            tensors[name] = bits.reshape(info["shape"])
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("checkpoint")
    make.add_argument("name", choices=("M1", "M2"))
    make.add_argument("folder", type=Path)
    convert = commands.add_parser("gguf")
    convert.add_argument("folder", type=Path)
    convert.add_argument("file", type=Path)
    convert.add_argument("dtype", choices=("bf16", "f16", "f32"))
    smaller = commands.add_parser("requantize")
    smaller.add_argument("source", type=Path)
    smaller.add_argument("target", type=Path)
    smaller.add_argument("kind", choices=("q8_0", "q4_0", "q4_K_M"))
    rust = commands.add_parser("mistralrs")
    rust.add_argument("folder", type=Path)
    rust.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "checkpoint":
        checkpoint(args.name, args.folder)
    elif args.command == "gguf":
        gguf(args.folder, args.file, args.dtype)
    elif args.command == "requantize":
        requantize(args.source, args.target, args.kind)
    else:
        mistralrs(args.folder, args.target)


if __name__ == "__main__":
    main()
