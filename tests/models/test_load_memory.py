"""Loading holds the model once: not the file beside it, mapped or read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quire.kernels.select import create_kernels
from quire.models.decoder import DecoderModel
from quire.models.registry import resolve_spec
from tests.models.published import SMOLLM2_135M

CONFIG = {**SMOLLM2_135M, "num_hidden_layers": 8, "vocab_size": 16384, "hidden_size": 1152,
          "intermediate_size": 3072, "num_attention_heads": 18, "num_key_value_heads": 6}  # fmt: skip
SLACK = 24 << 20
"""Bytes: a buffer a thread, the rotary table, what Python allocates meanwhile."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "quantization"),
    [
        (torch.bfloat16, None),
        (torch.float32, None),
        (torch.bfloat16, "int8"),
        (torch.bfloat16, "int4"),
    ],
)
def test_the_peak_of_loading_is_the_model(
    tmp_path: Path, stored: torch.dtype, quantization: str | None
) -> None:
    spec = resolve_spec(CONFIG)
    shape_of = {
        target.name: target.shape
        for target in DecoderModel(
            spec, dtype=stored, kernels=create_kernels("reference"), max_model_len=64
        ).targets()
    }
    save_file(
        {name: torch.zeros(shape, dtype=stored) for name, shape in shape_of.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code = textwrap.dedent(
        f"""
        import dataclasses, json, pathlib, torch
        from quire.kernels.select import create_kernels
        from quire.models.loader import load_model
        from quire.models.registry import resolve_spec
        from quire.weights.source import open_source

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

        directory = pathlib.Path({str(tmp_path)!r})
        spec = resolve_spec(json.loads((directory / "config.json").read_text()))
        if {quantization!r}:
            from quire.quantization.online import read_online
            spec = dataclasses.replace(spec, quantization=read_online({quantization!r}))
        kernels = create_kernels("auto")
        torch.set_num_threads(2)
        before = peak()
        source = open_source(directory)
        load_model(spec, source, dtype=torch.bfloat16, kernels=kernels, max_model_len=64)
        print(spec.weight_bytes(2), peak() - before)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    weight_bytes, more = map(int, done.stdout.split())
    assert weight_bytes > (100 << 20 if quantization is None else 50 << 20)
    assert more < weight_bytes + SLACK, f"{more >> 20} MiB for {weight_bytes >> 20} MiB of weights"
