"""Whose KV it is: what tiers and other instances compare before they give any."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from quire.config import EngineConfig
from quire.models.spec import ModelSpec
from quire.util.version import VERSION
from quire.weights.source import Checkpoint, TensorInfo, open_source

FORMAT = "quire KV 1"
"""Of a block's bytes, and of what a fingerprint is made of."""
PIECES = 16
PIECE_BYTES = 4096
"""Of a tensor that is larger than so many pieces, those are read, evenly spaced, first and last included. A
fine-tuned or merged model differs in nearly all of them. 272 tensors take 20 ms (SmolLM2, page cache)."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Equal for two instances that compute the same KV, bit for bit, and store it in the same form. Which
    layers and heads a rank has is not part of it.

    It cannot tell two models apart of which one is the other with single rows changed. Within one machine,
    `local` can.
    """

    model: bytes
    """SHA-256."""
    local: bytes
    """Also of the sizes and times of the weights' files: for a disk, which outlives them."""


def fingerprint_of(
    config: EngineConfig,
    model: ModelSpec,
    source: Path,
    *,
    dtype: str,
    kv_cache_dtype: str,
    numerics: str,
) -> Fingerprint:
    """model: of any rank. source: as for `open_source`. dtype, kv_cache_dtype: resolved. numerics: what the
    bits of results depend on, `quire.kernels.select.numerics_of`. Raises `CheckpointError`."""
    options, runtime = config.model, config.runtime
    digest = sha256()
    for fact in (
        FORMAT,
        VERSION,
        re.sub(r" at 0x[0-9a-f]+", "", repr(model.whole)),
        (dtype, kv_cache_dtype, config.cache.block_size),
        (numerics, runtime.cpu_activation_bits, runtime.attention_backend, runtime.batch_invariant),
    ):
        digest.update(repr(fact).encode() + b"\0")
    if options.load_format == "dummy":
        digest.update(f"dummy {options.seed}".encode())
        return Fingerprint(digest.digest(), digest.digest())
    with open_source(source).open() as checkpoint:
        digest.update(weights_digest(checkpoint))
        files = sorted({info.file for info in checkpoint.tensors.values()})
    local = digest.copy()
    for file in files:
        status = (source if source.is_dir() else source.parent).joinpath(file).stat()
        local.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
    return Fingerprint(digest.digest(), local.digest())


def weights_digest(checkpoint: Checkpoint) -> bytes:
    """Over pieces of every tensor. KV scales and all that is small are read whole."""
    digest = sha256()
    buffer = bytearray(PIECES * PIECE_BYTES)
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(repr((name, info.dtype, info.shape)).encode() + b"\0")
        for piece in _pieces(checkpoint, info, buffer):
            digest.update(piece)
    return digest.digest()


def _pieces(checkpoint: Checkpoint, info: TensorInfo, buffer: bytearray) -> Iterator[memoryview]:
    """Whole rows, as `Checkpoint.read` wants it."""
    num_rows = info.shape[0] if info.shape else 1
    row = info.num_bytes // max(1, num_rows)
    if info.num_bytes <= PIECES * PIECE_BYTES:
        starts, count = [0], num_rows
    else:
        count = min(num_rows, max(1, PIECE_BYTES // row))
        starts = sorted({i * (num_rows - count) // (PIECES - 1) for i in range(PIECES)})
    if count * row > len(buffer):
        buffer = bytearray(count * row)
    into = memoryview(buffer)[: count * row]
    for start in starts:
        if row:
            checkpoint.read(info, start * row, into)
            yield into
