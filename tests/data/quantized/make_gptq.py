"""Makes `gptq.safetensors`: small matrices packed by GPTQModel itself, with the first 16 hex digits of the
SHA-256 of what it unpacks them to, in float16.

    python -m venv v; v/bin/pip install torch==2.13.0 gptqmodel==7.6.0
    v/bin/python tests/data/quantized/make_gptq.py
"""

import hashlib
import itertools
import json
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from safetensors.torch import save_file

N, K, GROUP = 32, 64, 32


def main() -> None:
    generator = torch.Generator().manual_seed(13)
    tensors, about = {}, {}
    for bits, act_order in itertools.product((2, 3, 4, 8), (False, True)):
        groups = torch.arange(K) // GROUP
        if act_order:
            groups = groups[torch.randperm(K, generator=generator)]
        zeros = torch.randint(1, 2**bits, (N, K // GROUP), generator=generator)
        scales = (torch.rand(zeros.shape, generator=generator) + 0.1).half().float()
        codes = torch.randint(2**bits, (N, K), generator=generator)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
        packed = TorchLinear(
            bits=bits, group_size=GROUP, sym=False, desc_act=act_order, in_features=K, out_features=N,
            bias=False, pack_dtype=torch.int32,
        )  # fmt: skip
        packed.pack_original(linear, scales, zeros.float(), groups.int())
        packed.post_init()
        plain = packed.dequantize_weight().T.contiguous()
        kind = f"gptq{bits}" + ("-act-order" if act_order else "")
        assert (plain.float() - linear.weight).abs().max() < 0.1, kind
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{kind}/{name}"] = getattr(packed, name).contiguous()
        about[kind] = json.dumps(
            {
                "config": {
                    "quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False,
                    "desc_act": act_order, "checkpoint_format": "gptq_v2",
                },
                "shape": [N, K],
                "sha": hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16],
            }
        )  # fmt: skip
    save_file(tensors, Path(__file__).with_name("gptq.safetensors"), metadata=about)


if __name__ == "__main__":
    main()
