"""Reading safetensors checkpoints: memory-mapped, tensor by tensor, checked before the first byte is used.

safetensors only. A `.bin` file is a pickle, and loading one runs whatever its author put in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from quire.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the file's header says of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' own spelling: F32, BF16, F8_E4M3, ..."""


class Checkpoint:
    """An open checkpoint: headers read, files mapped, nothing copied. Use it as a context manager.

    A tensor from `tensor()` is a view of the mapped file and must not outlive the checkpoint's use:
    whoever keeps it copies it. That is what keeps loading at one copy of the model.
    """

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._stack = ExitStack()
        self._files: dict[str, safe_open] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            index = _read_index(model_dir)
            for file in (
                sorted(set(index.values())) if index is not None else _find_files(model_dir)
            ):
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
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files[file] = handle
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if index is not None and index.get(name) != file:
                    continue
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor {name} is in both {self.tensors[name].file} and {file} of {self._dir}; "
                        f"remove the file that does not belong, or add {INDEX_FILE}"
                    )
                view = handle.get_slice(name)
                self.tensors[name] = TensorInfo(file, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise _corrupt(path) from error

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{INDEX_FILE} places tensor {name} in {file}, which does not hold it; "
                    f"download {self._dir} again"
                )

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, as a view of its file."""
        info = self.tensors[name]
        try:
            tensor = self._files[info.file].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise _corrupt(self._dir / info.file) from error
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def close(self) -> None:
        self._files.clear()
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _corrupt(path: Path) -> CheckpointError:
    size = path.stat().st_size if path.is_file() else 0
    return CheckpointError(
        f"{path} ({size} bytes) is not a complete safetensors file; it may be truncated or "
        "a Git LFS pointer: download it again"
    )


def _read_index(model_dir: Path) -> Mapping[str, str] | None:
    """Tensor name -> file name, or None where the checkpoint has no index (a single file wins over one)."""
    path = model_dir / INDEX_FILE
    if (model_dir / SINGLE_FILE).is_file() or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON; download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map object; download it again")
    for name, file in weight_map.items():
        # A name, not a path: an index must not reach outside its own directory.
        if (
            not isinstance(file, str)
            or PurePath(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{path} places tensor {name} in {file!r}; a shard must be a .safetensors "
                "file beside the index"
            )
    return weight_map


def _find_files(model_dir: Path) -> list[str]:
    if (model_dir / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    # Mistral ships the same weights a second time, in its own names, as consolidated*.safetensors.
    files = sorted(
        p.name for p in model_dir.glob("*.safetensors") if not p.name.startswith("consolidated")
    )
    if files:
        return files
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt*")):
        raise CheckpointError(
            f"{model_dir} has only pickled weights (.bin or .pt), which can run code when "
            "loaded; convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"
        )
    raise CheckpointError(
        f"{model_dir} has no .safetensors file; point to a directory "
        "with weights, or use --load-format dummy"
    )
