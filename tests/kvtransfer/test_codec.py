from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

from quire.kvtransfer.codec import BLOCKS_UNTIL_RETRY, HEADER, Codec, Compressor, find_compressor


def kv(count: int = 4096, seed: int = 0, dtype: str = "bfloat16") -> np.ndarray:
    """Numbers like those of keys and values: as many bytes as elements times their size."""
    numbers = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return numbers.astype(dtype).view(np.uint8)


def noise(count: int = 8192, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def decoded(codec: Codec, record: bytes, size: int) -> np.ndarray | None:
    out = np.empty(size, np.uint8)
    return out if codec.decode(record, out) else None


@pytest.mark.parametrize(
    ("size", "dtype", "gain"),
    [(2, "bfloat16", 1.4), (2, "float16", 1.1), (4, "float32", 1.15), (1, "bfloat16", 1.1)],
)
def test_a_block_returns_bit_by_bit(size: int, dtype: str, gain: float) -> None:
    codec, data = Codec(size, find_compressor()), kv(dtype=dtype)
    record = codec.encode(data)
    assert len(data) / len(record) > gain
    assert np.array_equal(decoded(codec, record, len(data)), data)
    # another cache's codec reads it, and to any address
    out = np.empty(len(data) + 1, np.uint8)[1:]
    assert Codec(1, find_compressor()).decode(record, out)
    assert np.array_equal(out, data)


def test_what_does_not_compress_is_stored_and_tried_again_later() -> None:
    codec, data = Codec(2, find_compressor()), noise()
    assert len(codec.encode(data)) == len(data) + HEADER.size
    for _ in range(BLOCKS_UNTIL_RETRY):
        record = codec.encode(kv())
        assert len(record) == kv().nbytes + HEADER.size
        assert np.array_equal(decoded(codec, record, kv().nbytes), kv())
    assert len(codec.encode(kv())) < kv().nbytes


def test_several_tiers_compress_a_block_once() -> None:
    compressed = []

    def make() -> Compressor:
        found = find_compressor()()
        compress = found.compress
        found.compress = lambda data: (compressed.append(1), compress(data))[1]
        return found

    codec, data = Codec(2, make, repeats=True), kv()
    first = codec.encode(data)
    assert codec.encode(data[None][0]) is first and len(compressed) == 1
    data[5] ^= 1  # the same memory, another block
    second = codec.encode(data)
    assert len(compressed) == 2 and np.array_equal(decoded(codec, second, len(data)), data)


@pytest.mark.parametrize("data", [kv(300), noise(600)], ids=["compressed", "stored"])
def test_every_damaged_byte_is_noticed(data: np.ndarray) -> None:
    codec = Codec(2, find_compressor())
    record = codec.encode(data)
    assert decoded(codec, record, len(data)) is not None
    for place in range(len(record)):
        for bits in (1, 0x80, 0xFF):
            damaged = bytearray(record)
            damaged[place] ^= bits
            assert decoded(codec, bytes(damaged), len(data)) is None, place
    for length in range(len(record)):
        assert decoded(codec, record[:length], len(data)) is None, length
    assert decoded(codec, record + b"\0", len(data)) is None
    assert decoded(codec, record, len(data) - 2) is None
    assert decoded(codec, record, len(data) + 2) is None


def test_records_with_a_right_checksum_and_wrong_fields_are_misses() -> None:
    """A hostile file can have these."""
    import zlib

    codec, data = Codec(2, find_compressor()), kv(300)
    record = codec.encode(data)
    magic, version, size, length, packed, _ = HEADER.unpack(record[: HEADER.size])
    body = record[HEADER.size :]
    bomb = find_compressor()().compress(np.zeros(1 << 20, np.uint8))
    for fields, payload in [
        ((magic, version, 0, length, packed, 0), body),
        ((magic, version, 0, length, 0, 0), body),
        ((magic, version, 3, length, packed, 0), body),
        ((magic, version, 255, length, packed, 0), body),
        ((magic, version, size, length, packed + 1, 0), body),
        ((magic, version, size, length, 2**32 - 1, 0), body),
        ((magic, version + 1, size, length, packed, 0), body),
        ((magic, version, size, length, len(bomb), 0), bomb + body[packed:]),
        ((magic, version, size, length, packed, 0), bytes(packed) + body[packed:]),
    ]:
        header = HEADER.pack(*fields)[: HEADER.size - 4]
        check = zlib.crc32(payload, zlib.crc32(header)).to_bytes(4, "little")
        assert decoded(codec, header + check + payload, len(data)) is None, fields


def test_without_the_library_blocks_are_stored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compressed = Codec(2, find_compressor()).encode(kv())
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with caplog.at_level(logging.WARNING):
        codec = Codec(2, find_compressor())
    assert ["quire[kv]" in message for message in caplog.messages] == [True]
    record = codec.encode(kv())
    assert len(record) == kv().nbytes + HEADER.size
    assert np.array_equal(decoded(codec, record, kv().nbytes), kv())
    assert decoded(codec, compressed, kv().nbytes) is None
