"""What formats cost in quality: size, perplexity, KL divergence and equal best tokens to the original.

    python -m bench.quality ORIGINAL int8 int4 fp8_per_channel kv-fp8 FILE_OR_DIRECTORY ...

ORIGINAL: an unquantized checkpoint. A name of --quantization is measured on it, computed as while serving,
and so is kv-fp8, a KV cache in fp8 without scales; anything else is a checkpoint of the same model. Computed
in float32 unless --dtype says otherwise, on the text of `quire quantize` or on --text FILE. Prints a row of
markdown each.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from quire.cli.quantize.compare import TEXTS, logprobs, measure
from quire.models.registry import resolve_spec, text_config
from quire.quantization import ONLINE
from quire.quantization.online import read_online
from quire.weights.source import open_source

KV_FP8 = "kv-fp8"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original", type=Path)
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, default=TEXTS)
    args = parser.parse_args()
    source = open_source(args.original)
    spec = resolve_spec(text_config(source.config()))
    ids = source.tokenizer().encode(args.text.read_text(encoding="utf-8"))[: spec.context_length]
    original = logprobs(source, spec, ids, dtype=args.dtype)
    print(f"{len(ids)} tokens, {args.dtype}\n")
    print("| format | MB | perplexity | KL divergence | same top-1 |")
    print("|---|---|---|---|---|")
    print(_row("original", spec.weight_bytes(2), *measure(original, original, ids)))
    for name in args.formats:
        kv_dtype = None
        if name == KV_FP8:
            other, others, kv_dtype = source, spec, torch.float8_e4m3fn
        elif name in ONLINE:
            other, others = source, replace(spec, quantization=read_online(ONLINE[name]))
        else:
            other = open_source(Path(name))
            others = resolve_spec(text_config(other.config()))
        computed = logprobs(other, others, ids, dtype=args.dtype, kv_dtype=kv_dtype)
        found = measure(original, computed, ids)
        print(_row(Path(name).name, others.weight_bytes(2), *found), flush=True)


def _row(name: str, size: int, kl: float, top1: float, perplexity: float) -> str:
    return f"| {name} | {size / 1e6:.1f} | {perplexity:.2f} | {kl:.5f} | {top1:.1%} |"


if __name__ == "__main__":
    main()
