"""A directory in Hugging Face's layout: JSON files, and tensors in safetensors.

Only safetensors. A `.bin` file is a pickle, and loading one executes the code in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import CheckpointError
from quire.weights.files import INDEX_FILE, find_files, read_index
from quire.weights.names import QUANTIZED, text_tensors
from quire.weights.open_files import OpenFiles, unreadable
from quire.weights.safetensors_header import HeaderError, read_header
from quire.weights.source import TensorInfo

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"

QUANTIZATION_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Written beside a config.json that says nothing -> quant_method, if the file names none."""
OPTIONAL_SUFFIXES = ("lm_head.weight", "rotary_emb.inv_freq")
"""An index may name these without a tensor: saving drops a tied head and a buffer, but not always their
entries."""


class Source:
    """`ModelSource` of a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def config(self) -> dict[str, object]:
        """With `quantization_config`, if config.json has it, another tool's file beside it, or if the tensors
        are quantized. `tensors` in it is what the headers say of the text model's tensors."""
        config = read_json(self._path / "config.json")
        inner = config.get("text_config")
        for field in ("quantization_config", "compression_config"):
            for holder in (config, inner if isinstance(inner, dict) else {}):
                if isinstance(quantization := holder.get(field), dict) and quantization:
                    holder[field] = {**quantization, "tensors": self._tensors()}
                    return config
        quantization, tensors = self._quantization_file(), self._tensors()
        if quantization or any(QUANTIZED.search(name) for name in tensors):
            config["quantization_config"] = {**quantization, "tensors": tensors}
        return config

    def _quantization_file(self) -> dict[str, object]:
        for name, method in QUANTIZATION_FILES.items():
            if (path := self._path / name).is_file():
                found = read_json(path)
                inner = found.get("quantization")
                return {"quant_method": method, **(inner if isinstance(inner, dict) else found)}
        return {}

    def _tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Empty if the headers cannot be read, which loading will report."""
        try:
            with self.open() as checkpoint:
                return text_tensors(checkpoint.tensors)
        except CheckpointError:
            return {}

    def generation_config(self) -> dict[str, object]:
        path = self._path / GENERATION_CONFIG
        return read_json(path) if path.is_file() else {}

    def tokenizer(self) -> Tokenizer:
        from quire.text.tokenizer import Tokenizer

        return Tokenizer.from_directory(self._path)

    def open(self) -> SafetensorsCheckpoint:
        return SafetensorsCheckpoint(self._path)


def read_json(path: Path) -> dict[str, object]:
    """Raises `CheckpointError` for what is not a JSON object."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path} is not valid JSON; download it again") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return loaded


class SafetensorsCheckpoint(OpenFiles):
    """All the files that hold the model, open."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__()
        self._dir = model_dir
        try:
            index = read_index(model_dir)
            files = sorted(set(index.values())) if index is not None else find_files(model_dir)
            for file in files:
                self._open(file, index)
            if index is not None:
                self._check_index(index)
        except BaseException:
            self.close()
            raise

    def _open(self, file: str, index: Mapping[str, str] | None) -> None:
        path = self._dir / file
        if not path.is_file():
            raise CheckpointError(
                f"{INDEX_FILE} names {file}, which is not in {self._dir}; download that shard again"
            )
        try:
            handle, status = self.add_file(path)
            entries = read_header(handle, status.num_bytes)
        except OSError as error:
            raise unreadable(path, error) from error
        except HeaderError as error:
            raise _corrupt(path) from error
        for name, entry in entries.items():
            if index is not None and index.get(name) != file:
                continue
            if name in self.tensors:
                raise CheckpointError(
                    f"tensor {name} is in both {self.tensors[name].file} and {file} of {self._dir}; "
                    f"remove the file that does not belong, or add {INDEX_FILE}"
                )
            self.tensors[name] = TensorInfo(
                name, file, entry.shape, entry.dtype, entry.begin, entry.num_bytes
            )

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            if name not in self.tensors and not name.endswith(OPTIONAL_SUFFIXES):
                raise CheckpointError(
                    f"{INDEX_FILE} places tensor {name} in {file}, which does not hold it; "
                    f"download {self._dir} again"
                )


def _corrupt(path: Path) -> CheckpointError:
    size = path.stat().st_size if path.is_file() else 0
    return CheckpointError(
        f"{path} ({size} bytes) is not a complete safetensors file; it may be truncated or "
        "a Git LFS pointer: download it again"
    )
