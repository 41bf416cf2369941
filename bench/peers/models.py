"""Make the comparison's models: a Hugging Face checkpoint with random weights, and its conversions.

    python -m bench.peers.models checkpoint M2 DIR    (needs transformers and tokenizers)
    python -m bench.peers.models gguf DIR FILE TYPE   (needs gguf and numpy; libgguf for q8_0, q4_0, Q4_K_M)
    python -m bench.peers.models openvino DIR FOLDER int8|int4    (needs openvino and nncf)
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

GGUF_TYPES = {
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
    "f32": "ALL_F32",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "Q4_K_M": "MOSTLY_Q4_K_M",
}


def matrix_type(name: str, file_type: str, num_layers: int) -> str:
    """The type of a matrix in a file, as llama-quantize chooses it (llama-quant.cpp): the head of a smaller file,
    here the embedding, is q6_K; and in Q4_K_M the values and the MLP's second matrix of half of the layers."""
    if name == "model.embed_tokens.weight":
        return {"q4_0": "q6_K", "Q4_K_M": "q6_K"}.get(file_type, file_type)
    if file_type != "Q4_K_M":
        return file_type
    if name.endswith(("v_proj.weight", "down_proj.weight")):
        layer, eighth = int(name.split(".")[2]), num_layers // 8
        if layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2:
            return "q6_K"
    return "q4_K"


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
    """Write `folder`'s checkpoint as one GGUF file: matrices in `dtype` (of `GGUF_TYPES`), norms in f32."""
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
    writer.add_file_type(lib.LlamaFileType[GGUF_TYPES[dtype]])
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
        kind = matrix_type(name, dtype, config["num_hidden_layers"])
        _add_tensor(writer, name, data, (heads, kv_heads) if arch == "llama" else None, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- OpenVINO -------------------------------------------------------------------------------------


def openvino(folder: Path, target: Path, kind: str) -> None:
    """The converted checkpoint with compressed weights: int8, or int4 in groups of 128 with the embedding in
    int8. Both symmetric, without data, as `quire --quantization` does."""
    import shutil

    import nncf
    import openvino as ov

    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("openvino_model.*"))
    modes = nncf.CompressWeightsMode
    options: dict[str, Any] = {"mode": modes.INT8_SYM}
    if kind == "int4":
        options = {"mode": modes.INT4_SYM, "group_size": 128, "ratio": 1.0}
    model = ov.Core().read_model(folder / "openvino_model.xml")
    ov.save_model(nncf.compress_weights(model, **options), target / "openvino_model.xml")


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
        if data.ndim > 1 and dtype.startswith("q"):
            import libgguf

            kind = lib.GGMLQuantizationType[dtype.upper()]
            writer.add_tensor(gguf_name(name), libgguf.quantize_rows(wide, kind), raw_dtype=kind)
            return
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
    convert.add_argument("dtype", choices=GGUF_TYPES)
    compress = commands.add_parser("openvino")
    compress.add_argument("folder", type=Path)
    compress.add_argument("target", type=Path)
    compress.add_argument("kind", choices=("int8", "int4"))
    rust = commands.add_parser("mistralrs")
    rust.add_argument("folder", type=Path)
    rust.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "checkpoint":
        checkpoint(args.name, args.folder)
    elif args.command == "gguf":
        gguf(args.folder, args.file, args.dtype)
    elif args.command == "openvino":
        openvino(args.folder, args.target, args.kind)
    else:
        mistralrs(args.folder, args.target)


if __name__ == "__main__":
    main()
