"""From files to takers in pieces of rows, by several threads, each with one buffer.

A thread reads a piece into its buffer (which stays in the processor's cache) and hands it to its taker, which
packs it to its place. So the file's bytes cross memory once, what is held twice is a buffer a thread, and the
three things that take time run beside each other: waiting for the disk, the system's clearing of the
weights' fresh pages, and packing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from quire.layers.parameter import WeightTarget
from quire.weights.safetensors_reader import Checkpoint, TensorInfo

PIECE_BYTES = 1 << 20
"""Half of this fits a core's cache and is little slower; less costs calls, more misses the cache."""
ROW_STEP = 64
"""Pieces begin at multiples of so many rows: a packed panel is then one piece's alone."""

Progress = Callable[[int], object]
"""Told the bytes of each piece that has been loaded, by one thread at a time."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of one tensor. A row is all that one index of the first dimension selects."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of this piece."""
    row: int
    """The first one."""
    begin: int
    """Of the first row's bytes in the tensor."""
    num_bytes: int
    takers: Sequence[WeightTarget]


def load_pieces(
    wanted: Mapping[str, Sequence[WeightTarget]],
    checkpoint: Checkpoint,
    *,
    threads: int,
    progress: Progress,
) -> None:
    """Give every taker all rows of its tensor, in any order. Raises what the first failure raised."""
    infos = sorted(  # in the order of the disk
        ((name, checkpoint.tensors[name]) for name in wanted), key=lambda item: item[1].position
    )
    pieces = [piece for name, info in infos for piece in _cut(name, info, wanted[name])]
    threads = max(1, min(threads, len(pieces)))
    queue = _Queue(iter(pieces), progress)
    largest = max((piece.num_bytes for piece in pieces), default=0)
    if threads == 1:
        _work(checkpoint, queue, largest)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="quire-load") as pool:
        try:
            running = [pool.submit(_work, checkpoint, queue, largest) for _ in range(threads)]
            for future in running:
                future.result()
        finally:
            queue.close()  # whoever still works stops after the piece in hand


def _cut(name: str, info: TensorInfo, takers: Sequence[WeightTarget]) -> Iterator[_Piece]:
    if info.num_bytes == 0:
        return
    count = info.shape[0] if info.shape else 1
    row_bytes = info.num_bytes // count
    step = max(ROW_STEP, PIECE_BYTES // row_bytes // ROW_STEP * ROW_STEP)
    wanted = [range(count) if taker.taken is None else taker.taken[0] for taker in takers]
    end = max(rows.stop for rows in wanted)
    for row in range(min(rows.start for rows in wanted), end, step):
        rows = min(step, end - row)
        yield _Piece(
            name=name,
            dtype=getattr(torch, info.dtype),
            shape=(rows, *info.shape[1:]),
            row=row,
            begin=row * row_bytes,
            num_bytes=rows * row_bytes,
            takers=takers,
        )


class _Queue:
    """Pieces for many threads, and their progress for one listener."""

    def __init__(self, pieces: Iterator[_Piece], progress: Progress) -> None:
        self._pieces = pieces
        self._progress = progress
        self._lock = threading.Lock()
        self._open = True

    def take(self, done: _Piece | None) -> _Piece | None:
        """The next piece, in return for the last; None when there is none."""
        with self._lock:
            if done is not None:
                self._progress(done.num_bytes)
            return next(self._pieces, None) if self._open else None

    def close(self) -> None:
        with self._lock:
            self._open = False


@torch.inference_mode()  # a thread's own state: the layers' tensors were made in it
def _work(checkpoint: Checkpoint, queue: _Queue, buffer_bytes: int) -> None:
    buffer = torch.empty(buffer_bytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    piece = queue.take(None)
    try:
        while piece is not None:
            checkpoint.read(piece.name, piece.begin, view[: piece.num_bytes])
            rows = buffer[: piece.num_bytes].view(piece.dtype).view(piece.shape)
            for taker in piece.takers:
                taker.give(piece.row, rows)
            piece = queue.take(piece)
    except BaseException:
        queue.close()
        raise
