"""The worker's table of LoRA adapters: loading them beside the steps, and finding them for a request.

An adapter is known by its key, NAME@HASH (`AdapterInfo.key`). Its place in the table is an index, with
which a step's arrays name it. On a GPU the index is a slot at a fixed address, filled when a request first
needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quire.models.decoder import DecoderModel


class LoadedAdapter(NamedTuple):
    """The end of one `load`."""

    key: str
    error: str | None
    """None: it is in the table. Else why it is not, for the request's client: names no path."""
    num_bytes: int = 0
    seconds: float = 0.0


class AdapterTable:
    """Used by one thread, the engine core's; loading is done in another, of the lowest priority."""

    def __init__(self, model: DecoderModel, *, max_rank: int, capacity: int, slots: int) -> None:
        """capacity: the most adapters in memory, loading ones included (`max_cpu_loras`). slots: the most
        that requests use at the same time (`max_loras`).

        Raises `UnsupportedModelError` if the model or its device cannot have adapters.
        """
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """Memory of the adapters that are loaded."""
        raise NotImplementedError

    def load(self, key: str, path: Path) -> None:
        """Begin to load, unless the key is loaded or loading. The directory is checked again: its content
        must be what the key's hash says."""
        raise NotImplementedError

    def poll(self) -> Sequence[LoadedAdapter]:
        """What has ended since the last call, for better or worse. Does not wait."""
        raise NotImplementedError

    def wait(self, seconds: float) -> None:
        """Wait until there is something to poll; at most `seconds`."""
        raise NotImplementedError

    def drop(self, key: str) -> None:
        """Free its memory: at once, or when the last request that uses it has released it. Unknown keys are
        ignored; one that is loading will not be polled."""
        raise NotImplementedError

    def acquire(self, key: str | None) -> int:
        """The adapter's index for a request that is admitted (`StepRows.adapters`); -1 for None. It stays
        valid until the request's `release`. The key is loaded and not dropped: the engine holds requests
        back until then."""
        raise NotImplementedError

    def release(self, index: int) -> None:
        """The counterpart of `acquire`; -1 does nothing."""
        raise NotImplementedError
