"""The LoRA adapters that requests may name. Without torch, and without I/O except where it is said."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from quire.config import LoRAConfig
from quire.engine.setup import ServedModel
from quire.errors import InvalidParameterError, ModelNotFoundError
from quire.lora.request import LoRARequest
from quire.messages import AddAdapter, CoreInput, DropAdapter
from quire.placement import Placement
from quire.weights.adapter import CONFIG_FILE, TENSOR_FILE, check_adapter

MAX_ADAPTERS = 16_384
"""Most names."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter: a later content of its directory is another version."""

    name: str
    key: str
    """`Placement.adapter` of its requests."""
    path: Path
    rank: int
    """The largest rank of its matrices."""
    request: LoRARequest
    """As outputs show it."""


class AdapterRegistry:
    """Names and the current version of each. The methods that read files change nothing and may be called
    from any thread."""

    def __init__(self, config: LoRAConfig, model: ServedModel) -> None:
        self.config = config
        self._model = model
        self._current: dict[str, Adapter] = {}
        self._versions: dict[tuple[str, str], Adapter] = {}
        """By name and path of `LoRARequest`s."""
        self._num_read = 0
        self._dropped: set[str] = set()
        """Keys that no later request names, and that the core has not been told about."""

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._current.values())

    def find(self, name: str) -> Adapter | None:
        return self._current.get(name)

    def named(self, name: str) -> Adapter:
        """Raises `ModelNotFoundError`."""
        adapter = self._current.get(name)
        if adapter is None:
            raise ModelNotFoundError(
                f"The model `{name[:256]}` does not exist.", param="model", value=name
            )
        return adapter

    def place(self, placement: Placement) -> tuple[Placement, LoRARequest | None]:
        """The placement of a request, with the current version for the adapter's name. Raises
        `ModelNotFoundError`."""
        if placement.adapter is None:
            return placement, None
        adapter = self.named(placement.adapter)
        return msgspec.structs.replace(placement, adapter=adapter.key), adapter.request

    def of(self, request: LoRARequest) -> Adapter | None:
        """The version that was read for such a request before. None: read it."""
        if request.load_inplace:
            return None
        return self._versions.get((request.lora_name, str(request.lora_path)))

    def publish(self, adapter: Adapter, *, replaces: bool = True) -> list[CoreInput]:
        """Make it the current version of its name. Returns messages for the core. Raises
        `InvalidParameterError` if there are too many.

        replaces: no later request will name the version before it.
        """
        if adapter.name not in self._current and len(self._current) >= MAX_ADAPTERS:
            raise InvalidParameterError(
                f"{MAX_ADAPTERS} adapters are served, which is the limit; unload one.",
                param="lora_name",
            )
        before = self._current.get(adapter.name)
        if before is adapter:
            return []
        self._current[adapter.name] = adapter
        self._dropped.discard(adapter.key)
        if replaces and before is not None and before.key != adapter.key:
            self._dropped.add(before.key)
        if not replaces:
            self._versions[adapter.name, str(adapter.request.lora_path)] = adapter
        return [AddAdapter(adapter.key, str(adapter.path))]

    def remove(self, name: str) -> None:
        """Later requests do not find it."""
        self._dropped.add(self._current.pop(name).key)

    def discard(self, adapter: Adapter) -> None:
        """It could not be loaded."""
        current = self._current.get(adapter.name)
        if current is None or current.key != adapter.key:
            self._dropped.add(adapter.key)

    def take_dropped(self, in_use: Iterable[str | None]) -> list[CoreInput]:
        """Messages for the core about versions that are no longer needed. in_use: keys of beam searches,
        whose later rounds name them again."""
        ready = self._dropped.difference(in_use) if self._dropped else ()
        self._dropped.difference_update(ready)
        return [DropAdapter(key) for key in ready]

    # --- reading files ----------------------------------------------------------------------------

    def read(self, request: LoRARequest) -> Adapter:
        """Check an adapter's files, all but their numbers. Blocks.

        Raises `InvalidParameterError` if adapters are not served, `CheckpointError` or
        `UnsupportedModelError`.
        """
        if not self.config.enable_lora:
            raise InvalidParameterError(
                "LoRA is not enabled; start with enable_lora=True (--enable-lora).",
                param="lora_request",
            )
        path = Path(os.path.realpath(Path(request.lora_path).expanduser()))
        info = check_adapter(path, self._model.spec, max_rank=self.config.max_lora_rank)
        name = request.lora_name
        return Adapter(name, info.key(name), path, info.max_rank, request)

    def new_request(
        self, name: str, path: str | Path, base_model_name: str | None = None
    ) -> LoRARequest:
        """For an adapter that was named otherwise."""
        before = self._current.get(name)
        if before is None:
            self._num_read += 1
        number = self._num_read if before is None else before.request.lora_int_id
        known = base_model_name in self._model.names
        return LoRARequest(name, number, str(path), base_model_name if known else None)

    def confined(self, name: str, path: str) -> Path:
        """A client's path, which is below one of `lora_dir`, links resolved. Relative ones are taken from
        there. Blocks.

        Raises `InvalidParameterError` if it is elsewhere, whether or not there is something, and
        `ModelNotFoundError` if there is no adapter. Both texts name no path.
        """
        if not self.config.lora_dir:
            raise InvalidParameterError(
                "this server loads no adapters by path; it was started without --lora-dir.",
                param="lora_path",
            )
        inside = [found for root in self.config.lora_dir if (found := _below(root, path))]
        if not inside:
            raise InvalidParameterError(
                "lora_path must be below a directory that the server was given with --lora-dir.",
                param="lora_path",
            )
        for found in inside:
            if _is_adapter(found):
                return found
        raise ModelNotFoundError(
            f"Loading lora {name} failed: No adapter found.", param="lora_path"
        )

    def located(self, name: str) -> Path | None:
        """The adapter in the subdirectory `name` of `lora_dir`. Blocks."""
        if "/" in name:
            return None
        for root in self.config.lora_dir:
            found = _below(root, name)
            if found is not None and _is_adapter(found):
                return found
        return None


def _below(root: str, path: str) -> Path | None:
    """`path`, taken from `root`, if it and the adapter's files are truly below `root`: symbolic links count
    as what they point at."""
    if "\0" in path:
        return None
    base = os.path.realpath(Path(root).expanduser())
    found = os.path.realpath(os.path.join(base, path))
    files = [os.path.realpath(os.path.join(found, name)) for name in (CONFIG_FILE, TENSOR_FILE)]
    inside = found != base and all(
        os.path.commonpath((base, each)) == base for each in (found, *files)
    )
    return Path(found) if inside else None


def _is_adapter(path: Path) -> bool:
    try:
        return (path / CONFIG_FILE).is_file()
    except OSError:  # a name that is too long
        return False
