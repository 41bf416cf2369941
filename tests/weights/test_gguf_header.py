"""The header of a GGUF file is read in bounded time and memory, whatever its bytes are."""

from __future__ import annotations

import io
import resource
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import ModelError
from quire.models.registry import resolve_spec
from quire.quantization.gguf_types import BLOCKS
from quire.weights.gguf import Source
from quire.weights.gguf_header import Header, HeaderError, Strings, read_header
from tests.weights.gguf_writer import Stored, encode, stored, text, typed

METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|end|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.chat_template": "{{ messages }}",
    "other.flags": [True, False],
    "other.floats": [0.5, 1.5],
}
TENSORS: dict[str, Stored] = {
    "token_embd.weight": stored(torch.ones(4, 32), "q8_0"),
    "output_norm.weight": stored(torch.ones(32)),
    "blk.0.attn_q.weight": stored(torch.ones(32, 32), "q4_0"),
    "rope_freqs.weight": stored(torch.ones(8)),
}
FILE = encode(METADATA, TENSORS)


def read(data: bytes) -> Header:
    return read_header(io.BytesIO(data), len(data))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 32, 64, 1])
def test_what_was_written_is_read(version: int, alignment: int | None) -> None:
    more = {} if alignment is None else {"general.alignment": alignment}
    data = encode({**more, **METADATA}, TENSORS, version=version)
    header = read(data)
    for key, value in METADATA.items():
        got = header.metadata[key]
        got = list(got) if isinstance(value, list) else got  # type: ignore[call-overload]
        assert got == (pytest.approx(value) if isinstance(value, float) else value), key
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Strings) and (tokens[1:3], tokens[-1]) == (["b", "ab"], "<|end|>")
    assert list(header.tensors) == list(TENSORS)
    for name, (kind, shape, bytes_) in TENSORS.items():
        entry = header.tensors[name]
        assert (entry.type, entry.shape, entry.num_bytes) == (kind, shape, len(bytes_))
        assert data[entry.begin : entry.begin + entry.num_bytes] == bytes_


def test_it_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.weights.gguf_header.READ_BYTES", 7)
    header = read(FILE)
    assert list(header.metadata["tokenizer.ggml.tokens"]) == METADATA["tokenizer.ggml.tokens"]  # type: ignore[call-overload]
    assert header.tensors == read(FILE).tensors


def test_every_type_has_the_size_of_its_blocks() -> None:
    gguf = pytest.importorskip("gguf")
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    names |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    known = {name.lower(): block for name, block in BLOCKS.items()}
    for kind, size in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q1_0":
            assert known[names.get(kind.name, kind.name.lower())] == size


def header(*, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def pair(kind: int, data: bytes, key: str = "k") -> bytes:
    return header(pairs=1, rest=text(key) + struct.pack("<I", kind) + data)


def tensor(
    *, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, size: int = 4096
) -> bytes:
    entry = text("t") + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return header(tensors=1, rest=entry + struct.pack("<IQ", kind, offset)) + bytes(size)


def array_of(kind: int, count: int, data: bytes = b"") -> bytes:
    return pair(9, struct.pack("<IQ", kind, count) + data)


HUGE = (1 << 64) - 1
TWICE = dict.fromkeys(("a", "b"), TENSORS["output_norm.weight"])
HOSTILE: list[tuple[bytes, str]] = [
    (b"", "does not begin like"),
    (b"GGUF", "does not begin like"),
    (b"GGML" + bytes(64), "does not begin like"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (header(tensors=HUGE), "too short for its counts"),
    (header(pairs=HUGE), "too short for its counts"),
    (header(pairs=1 << 20), "too short for its counts"),
    (header(pairs=1, rest=struct.pack("<Q", HUGE) + bytes(64)), "too short for"),
    (pair(8, struct.pack("<Q", 1 << 40) + bytes(64)), "too short for"),
    (pair(8, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
    (pair(13, bytes(16)), "unknown type 13"),
    (array_of(4, HUGE, bytes(64)), "too short for an array of"),
    (array_of(8, 1 << 60, bytes(64)), "too short for an array of"),
    (array_of(8, 2, text("a") + struct.pack("<Q", HUGE)), "ends in an array of 2 texts"),
    (array_of(8, 3, text("a") + text("b") + bytes(7)), "too short"),
    (array_of(9, 1, bytes(64)), "an array of arrays"),
    (header(pairs=2, rest=2 * (text("k") + struct.pack("<IB", 0, 1))), "the key 'k' twice"),
    (encode({"general.alignment": 24}, {}), "no power of two"),
    (encode({"general.alignment": 0}, {}), "no power of two"),
    (pair(8, text("32"), "general.alignment"), "no power of two"),
    (tensor(dims=()), "0 dimensions"),
    (tensor(dims=(1,) * 5), "5 dimensions"),
    (tensor(dims=(0,)), r"dimensions \[0\]"),
    (tensor(dims=(1 << 40, 1 << 40)), "dimensions"),
    (tensor(dims=(1 << 60,)), "truncated"),
    (tensor(kind=4), "type 4, which is not known"),
    (tensor(dims=(48,), kind=2), "rows of 48 values, no multiple of the 32 of q4_0"),
    (tensor(offset=8), "offset 8, no multiple of the alignment 32"),
    (tensor(offset=1 << 63), "truncated"),
    (tensor(size=0), "truncated"),
    (FILE[:-1], "truncated"),
    (
        encode({}, TWICE).replace(struct.pack("<IQ", 0, 128), struct.pack("<IQ", 0, 32)),
        "in another one's bytes",
    ),
    (encode({}, TWICE).replace(text("b"), text("a")), "the tensor 'a' twice"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), HOSTILE)
def test_a_hostile_file_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=message):
        read(data)


@pytest.mark.parametrize("end", range(0, len(FILE) - len(TENSORS["rope_freqs.weight"][2]), 11))
def test_a_truncated_file_is_an_error(end: int) -> None:
    with pytest.raises(HeaderError):
        read(FILE[:end])


def everything(path: Path) -> None:
    """All that the engine reads but for the tensors' data."""
    source = Source(path)
    resolve_spec(source.config()).weight_bytes(2)
    source.generation_config()
    source.tokenizer()
    with source.open() as checkpoint:
        for info in checkpoint.tensors.values():
            row = info.num_bytes // info.shape[0]
            checkpoint.read(info, 0, memoryview(bytearray(row)))


@pytest.fixture(scope="module")
def survives(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], None]:
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(ModelError):
            everything(path)

    return check


@settings(max_examples=400, deadline=2000)
@given(st.data())
def test_changed_bytes(survives: Callable[[bytes], None], data: st.DataObject) -> None:
    changed = bytearray(FILE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 32, 127, 128, 255]))
    survives(bytes(changed))


@settings(max_examples=200, deadline=2000)
@given(st.data())
def test_changed_numbers(survives: Callable[[bytes], None], data: st.DataObject) -> None:
    """Lengths, counts and offsets."""
    changed = bytearray(FILE)
    at = data.draw(st.integers(0, len(FILE) // 8 - 1)) * 8 + data.draw(st.sampled_from([0, 1, 4]))
    number = data.draw(st.sampled_from([0, 1, 1 << 16, 1 << 31, 1 << 40, 1 << 63, HUGE]))
    changed[at : at + 8] = struct.pack("<Q", number)
    survives(bytes(changed))


VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.text(max_size=8),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    st.lists(st.floats(width=32), max_size=5),
    st.lists(st.text(max_size=4), max_size=5),
)


@settings(max_examples=300, deadline=2000)
@given(st.sampled_from(sorted(METADATA)), VALUES)
def test_values_of_other_types(survives: Callable[[bytes], None], key: str, value: object) -> None:
    survives(encode({**METADATA, key: value}, TENSORS))


def test_the_unchanged_file_is_read_without_an_error(tmp_path: Path) -> None:
    """Else the tests above show nothing."""
    (tmp_path / "x.gguf").write_bytes(FILE)
    everything(tmp_path / "x.gguf")


def test_many_empty_texts_take_little_memory() -> None:
    """16 MB of lengths: nothing is made for each of them but its end."""
    data = array_of(8, 2_000_000, bytes(16_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = read(data).metadata["k"]
    assert isinstance(tokens, Strings) and len(tokens) == 2_000_000 and tokens[1_999_999] == ""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_typed_values_are_what_the_file_says() -> None:
    """Every scalar type."""
    values = {0: ("B", 7), 1: ("b", -7), 2: ("H", 7), 3: ("h", -7), 4: ("I", 7), 5: ("i", -7),
              6: ("f", 0.5), 7: ("?", True), 10: ("Q", HUGE), 11: ("q", -7), 12: ("d", 0.1)}  # fmt: skip
    for kind, (code, value) in values.items():
        got = read(pair(kind, struct.pack("<" + code, value))).metadata["k"]
        assert got == value and type(got) is type(value)
        many = read(array_of(kind, 2, 2 * struct.pack("<" + code, value))).metadata["k"]
        assert list(many) == [value, value]  # type: ignore[call-overload]
    assert typed(True)[0] == 7
