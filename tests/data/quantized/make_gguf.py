"""Writes gguf.json beside it: the values of `gguf_rows`, by two readers that must agree.

pip install gguf==0.19.0 libgguf==0.2.2
PYTHONPATH=src:. python tests/data/quantized/make_gguf.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import libgguf
import numpy as np
from tests.quantization.gguf_rows import SHAPES, raw_rows

from quire.quantization.gguf import FORMATS
from quire.quantization.gguf_types import BLOCKS


def values(kind: str, rows: int, blocks: int) -> np.ndarray:
    raw, number = raw_rows(kind, rows, blocks), gguf.GGMLQuantizationType[kind.upper()]
    first = gguf.dequantize(raw, number)
    second = libgguf.dequantize_rows(raw, number, blocks * BLOCKS[kind].elements)
    assert np.array_equal(first.view(np.uint32), second.view(np.uint32)), kind
    return first


digests = {
    f"{kind} {rows} {blocks}": hashlib.sha256(values(kind, rows, blocks).tobytes()).hexdigest()
    for kind in FORMATS
    for rows, blocks in SHAPES
}
path = Path(__file__).with_name("gguf.json")
path.write_text(json.dumps(digests, indent=1) + "\n")
