"""Page-locked memory and events for small copies between host and GPU. They are used again.

The obvious way, a new page-locked tensor and a new event for each copy, costs several calls of the
driver in a step. And the capture of a graph returns PyTorch's free page-locked memory to the driver, so
the steps after it allocate it anew, which stops the device. What a step copies is small and few: some
pieces that are never freed suffice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

PIECE_BYTES = 256 << 10
"""The inputs of a step of 512 rows and 8192 tokens take 60 KiB."""
MOST_PIECES = 16
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Piece:
    memory: Tensor
    """uint8, page-locked."""
    launched: torch.cuda.Event
    """What is copied to the host has been computed."""
    done: torch.cuda.Event
    """The copies have been carried out."""
    is_kept: bool
    """Whether it is used again."""

    def like(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Tensors of these shapes and types in this memory."""
        found, start = [], 0
        for tensor in tensors:
            part = self.memory[start : start + tensor.nbytes]
            found.append(part.view(tensor.dtype).view(tensor.shape))
            start += _aligned(tensor.nbytes)
        return found


class Pieces:
    """The pieces for copies in one direction. From several threads."""

    def __init__(self, *, blocking: bool) -> None:
        """blocking: of the events."""
        self._blocking = blocking
        self._count = 0
        self._free: list[Piece] = []
        self._busy: deque[Piece] = deque()
        """In the order in which their copies were launched."""
        self._lock = Lock()

    def take(self, tensors: Sequence[Tensor]) -> Piece:
        """With room for these tensors. Never waits: a new one for this copy only, if they are large or
        all pieces are in use."""
        size = sum(_aligned(tensor.nbytes) for tensor in tensors)
        if size <= PIECE_BYTES:
            with self._lock:
                if self._busy and self._busy[0].done.query():
                    self._free.append(self._busy.popleft())
                if self._free:
                    return self._free.pop()
                if self._count < MOST_PIECES:
                    self._count += 1
                    return self._create(PIECE_BYTES, is_kept=True)
        return self._create(size, is_kept=False)

    def give_back(self, piece: Piece) -> None:
        """Nobody reads or writes it any more."""
        if piece.is_kept:
            with self._lock:
                self._free.append(piece)

    def give_back_when_done(self, piece: Piece) -> None:
        """`piece.done` was recorded after the copies. PyTorch itself frees the memory of a piece that is
        not kept no sooner."""
        if piece.is_kept:
            with self._lock:
                self._busy.append(piece)

    @torch.inference_mode(False)  # else no one could write it outside of that mode
    def _create(self, size: int, *, is_kept: bool) -> Piece:
        launched, done = (torch.cuda.Event(blocking=self._blocking) for _ in range(2))
        return Piece(page_locked(size), launched, done, is_kept)


def page_locked(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
