"""Makes `copied.safetensors`: one matrix of each checkpoint in ../shared/quantized, with its config, its
shape and its digest in that checkpoint's oracle.json.

    python tests/data/quantized/copy_matrices.py /work/shared/quantized
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

KINDS = ("w4a16_g64", "w8a8", "fp8_block", "gptq4_g64_asym_v2", "awq_g64")
NAME = "model.layers.0.self_attn.k_proj"


def main(root: Path) -> None:
    tensors, about = {}, {}
    for kind in KINDS:
        with safe_open(root / kind / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(NAME + "."):
                    tensors[f"{kind}/{name.removeprefix(NAME + '.')}"] = file.get_tensor(name)
        shape, sha = json.loads((root / kind / "oracle.json").read_text())["weights"][
            NAME + ".weight"
        ]
        config = json.loads((root / kind / "config.json").read_text())["quantization_config"]
        about[kind] = json.dumps({"config": config, "shape": shape, "sha": sha})
    save_file(tensors, Path(__file__).with_name("copied.safetensors"), metadata=about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
