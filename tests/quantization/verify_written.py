"""Are the files of `quire quantize` what compressed-tensors and transformers read?

In an environment of its own:

    python -m venv V; V/bin/pip install torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.1
    for each of SCHEMES: quire quantize quire-builtin OUT/NAME FLAGS
    PYTHONPATH=src V/bin/python tests/quantization/verify_written.py OUT

Each matrix that transformers loads must have the bits of our rounding of the original's: the product of
code and scale, rounded to the scale's dtype as compressed-tensors does. Then the model must speak.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import dequantize
from quire.quantization.rounding import quantize

ORIGINAL = Path(__file__).parents[2] / "src/quire/builtin/model"
BF16 = {"scale": "bfloat16"}
HEAD = CodeFormat(bits=8, zero=128, **BF16)
SCHEMES = {  # folder: (flags, format of the layers, whether the head is int8)
    "w4a16": ("--scheme w4a16", CodeFormat(bits=4, group=64, zero=8, **BF16), False),
    "w4a16-asym": (
        "--scheme w4a16 --asym --group-size 32",
        CodeFormat(bits=4, group=32, offset="zero", **BF16),
        False,
    ),
    "w8a16": ("--scheme w8a16", CodeFormat(bits=8, zero=128, **BF16), False),
    "w8a16-asym": (
        "--scheme w8a16 --asym --group-size 64",
        CodeFormat(bits=8, group=64, offset="zero", **BF16),
        False,
    ),
    "w8a16-head": ("--scheme w8a16 --head w8", CodeFormat(bits=8, zero=128, **BF16), True),
    "w4a16-head": ("--scheme w4a16 --head w8", CodeFormat(bits=4, group=64, zero=8, **BF16), True),
    "fp8": ("--scheme fp8", CodeFormat(bits=8, float8=True, **BF16), False),
    "fp8-head": ("--scheme fp8 --head w8", CodeFormat(bits=8, float8=True, **BF16), True),
}


def main() -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    original = load_file(ORIGINAL / "model.safetensors")
    for name, (flags, form, has_head) in SCHEMES.items():
        folder = Path(sys.argv[1]) / name
        # transformers 5.23 reads zeros only so, and heads of another format only otherwise.
        how = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(folder, **how if form.offset == "zero" else {})
        text = AutoTokenizer.from_pretrained(folder)("def add(a, b):\n", return_tensors="pt")
        answer = model.generate(**text, max_new_tokens=8, do_sample=False)  # decompresses
        found = model.state_dict()
        for key, weight in original.items():
            expected = weight
            if key.endswith("proj.weight"):
                expected = dequantize(form, *quantize(weight, form)).bfloat16()
            assert torch.equal(found[key], expected), (name, key)
        embedding = original["model.embed_tokens.weight"]
        head = dequantize(HEAD, *quantize(embedding, HEAD)).bfloat16() if has_head else embedding
        assert torch.equal(found["lm_head.weight"], head), name
        print(f"{name} ({flags}): {len(found)} tensors equal; {answer[0].tolist()}")


if __name__ == "__main__":
    main()
