"""Our reading of the header against the library's: the same tensors, and nothing that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quire.weights.safetensors_header import Entry, HeaderError, read_header

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]
FUNCTION_SCOPE = [HealthCheck.function_scoped_fixture]


def write(path: Path, header: object, data: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def read(path: Path) -> dict[str, Entry]:
    with path.open("rb") as file:
        return read_header(file, path.stat().st_size)


@settings(max_examples=50, suppress_health_check=FUNCTION_SCOPE)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)),
        max_size=5,
    )
)
def test_the_library_s_files(
    tmp_path: Path, tensors: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    path = tmp_path / "x.safetensors"
    saved = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    save_file(saved, path, metadata={"format": "pt"})
    entries, content = read(path), path.read_bytes()
    assert set(entries) == set(saved)
    for name, tensor in saved.items():
        entry = entries[name]
        assert entry.shape == tuple(tensor.shape)
        stored = content[entry.begin : entry.begin + entry.num_bytes]
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=200, suppress_health_check=FUNCTION_SCOPE)
@given(data=st.data())
def test_what_the_library_refuses_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """A real file with some bytes of its first 300 changed, or cut, or longer."""
    path = tmp_path / "x.safetensors"
    save_file({"one": torch.ones(3, 2), "two": torch.ones(4, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, min(300, len(content)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    length = data.draw(st.integers(0, len(content) + 8))
    path.write_bytes(bytes(content[:length]).ljust(length, b"\0"))
    try:
        with safe_open(path, framework="pt") as theirs:
            names = set(theirs.keys())
    except SafetensorError:
        with pytest.raises(HeaderError):
            read(path)
        return
    try:
        assert set(read(path)) == names
    except HeaderError:  # we may be stricter
        pass


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ([], 0),
        ({"a": 3}, 8),
        ({"a": {**F32, "dtype": 3}}, 8),
        ({"a": {**F32, "shape": 2}}, 8),
        ({"a": {**F32, "shape": [2.0]}}, 8),
        ({"a": {**F32, "shape": [True, 2]}}, 8),
        ({"a": {**F32, "shape": [-2]}}, 8),
        ({"a": {**F32, "shape": [3]}}, 8),
        ({"a": {**F32, "data_offsets": [0]}}, 8),
        ({"a": {**F32, "data_offsets": [8, 0]}}, 8),
        ({"a": {**F32, "data_offsets": [4, 12]}}, 12),
        ({"a": F32}, 7),
        ({"a": F32}, 9),
        ({"a": F32, "b": F32}, 8),
        (b'{"a": 1, "a": 2}', 0),
        (b"[" * 100_000, 0),
        (b"\xff\xfe", 0),
    ],
)
def test_headers_that_cannot_be(tmp_path: Path, header: object, data: int) -> None:
    with pytest.raises(HeaderError):
        read(write(tmp_path / "x", header, data))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 9])
def test_a_length_beyond_the_file_is_not_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(HeaderError, match="does not fit"):
        read(path)


def test_an_unknown_type_is_taken_as_stated(tmp_path: Path) -> None:
    odd = {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}
    assert read(write(tmp_path / "x", {"a": odd}, 8))["a"].dtype == "F99"
