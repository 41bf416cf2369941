"""Makes `compressed_tensors.safetensors`: small matrices packed by compressed-tensors itself, with the first
16 hex digits of the SHA-256 of what it unpacks them to, in float32.

    python -m venv v; v/bin/pip install torch==2.13.0 compressed-tensors==0.20.1 safetensors
    v/bin/python tests/data/quantized/make_compressed_tensors.py

A kind's config and digest are in the file's metadata, its tensors are named "kind/weight_packed".
"""

import hashlib
import json
from pathlib import Path

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

PACKED, BYTES, FLOAT8 = "pack-quantized", "int-quantized", "float-quantized"


def kinds():
    for bits in range(2, 9):
        yield f"int{bits}-g32", PACKED, (40, 96), {"num_bits": bits, "group_size": 32}
    for bits in (2, 3, 4, 8):
        args = {"num_bits": bits, "group_size": 32, "symmetric": False}
        yield f"int{bits}-g32-asym", PACKED, (40, 96), args
    for bits in (3, 4, 5, 8):
        yield f"int{bits}-channel", PACKED, (24, 72), {"num_bits": bits, "strategy": "channel"}
    args = {"num_bits": 4, "strategy": "channel", "symmetric": False}
    yield "int4-channel-asym", PACKED, (40, 72), args
    yield "int8-bytes", BYTES, (24, 72), {"num_bits": 8, "strategy": "channel"}
    yield "int8-bytes-tensor", BYTES, (24, 72), {"num_bits": 8, "strategy": "tensor"}
    args = {"num_bits": 8, "strategy": "channel", "symmetric": False}
    yield "int8-bytes-asym", "naive-quantized", (24, 72), args
    floats = {"num_bits": 8, "type": "float"}
    yield "fp8-tensor", FLOAT8, (24, 72), {**floats, "strategy": "tensor"}
    yield "fp8-channel", "naive-quantized", (24, 72), {**floats, "strategy": "channel"}
    args = {**floats, "strategy": "block", "block_structure": [32, 64]}
    yield "fp8-block", FLOAT8, (72, 136), args
    yield "nvfp4", "nvfp4-pack-quantized", (24, 96), {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn,
    }  # fmt: skip
    mx = {"type": "float", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    yield "mxfp4", "mxfp4-pack-quantized", (24, 96), {**mx, "num_bits": 4}
    yield "mxfp8", "mxfp8-quantized", (24, 96), {**mx, "num_bits": 8}


def main() -> None:
    generator = torch.Generator().manual_seed(13)
    tensors, about = {}, {}
    for kind, layout, shape, args in kinds():
        weight = torch.randn(shape, generator=generator) * 0.1
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**args), format=layout
        )
        stored = compress(weight, layout, scheme)
        plain = decompress({**stored}, layout, scheme)
        if "fp4" in layout:
            plain += 0.0  # Quire has no -0.0
        assert (plain - weight).abs().mean() < 0.08, kind
        tensors |= {f"{kind}/{name}": tensor.contiguous() for name, tensor in stored.items()}
        weights = json.loads(scheme.weights.model_dump_json())
        about[kind] = json.dumps(
            {
                "config": {
                    "quant_method": "compressed-tensors",
                    "format": layout,
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                },
                "shape": list(shape),
                "sha": hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16],
            }
        )
    save_file(tensors, Path(__file__).with_name("compressed_tensors.safetensors"), metadata=about)


def compress(weight, layout, scheme):
    args = scheme.weights
    n, k = weight.shape
    state = {"weight": weight}
    gain = None
    if args.strategy == "tensor_group":
        gain = generate_gparam(weight.min(), weight.max())
        state["weight_global_scale"] = gain.reshape(1)
    if args.strategy == "block":
        a, b = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -k % b, 0, -n % a))
        grid = padded.reshape(padded.shape[0] // a, a, -1, b)
        low, high = grid.amin((1, 3)), grid.amax((1, 3))
    elif args.strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        grid = weight.reshape(n, -1, args.group_size or k)
        low, high = grid.amin(2), grid.amax(2)
    scale, zero = calculate_qparams(low, high, args, global_scale=gain)
    state["weight_scale"] = scale if "fp4" in layout or "mx" in layout else scale.bfloat16()
    state["weight_zero_point"] = zero
    return BaseCompressor.get_value_from_registry(layout).compress(state, scheme)


def decompress(state, layout, scheme):
    """In float32, with scales widened first: by default it multiplies in the dtype of the scales."""
    if layout.startswith(("nvfp4", "mxfp4")):
        packed = state["weight_packed"]
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2).float()
        mx = layout.startswith("mx")
        scale = decompress_mx_scale(state["weight_scale"]) if mx else state["weight_scale"]
        gain = state.get("weight_global_scale")
        return dequantize(
            codes, scale.float(), args=scheme.weights, global_scale=gain, dtype=torch.float32
        )
    if layout.startswith("mxfp8"):
        scale = decompress_mx_scale(state["weight_scale"]).float()
        return dequantize(state["weight"], scale, args=scheme.weights, dtype=torch.float32)
    state["weight_scale"] = state["weight_scale"].float()
    return BaseCompressor.get_value_from_registry(layout).decompress(state, scheme)["weight"]


if __name__ == "__main__":
    main()
