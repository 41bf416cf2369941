"""Loading with several threads: each reads pieces of rows into its buffer and passes them to the targets.

A target packs a piece while it is in the processor's cache. So the file's bytes cross memory once, and
besides the model only one buffer per thread is needed. Reading from the disk, clearing of the weights'
new pages by the kernel, and packing run at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from quire.layers.parameter import WeightTarget
from quire.weights.source import Checkpoint, TensorInfo

PIECE_BYTES = 1 << 20
"""Half of it fits a core's cache and is a little slower. Smaller pieces need more calls; larger ones miss
the cache."""
ROW_STEP = 64
"""Pieces begin at multiples of this number of rows, so a packed panel belongs to one piece only."""

Progress = Callable[[int], object]
"""Called with the bytes of each loaded piece, by one thread at a time."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of one tensor. A row is what one index of the first dimension selects."""

    info: TensorInfo
    shape: tuple[int, ...]
    """Of this piece, in `dtype`."""
    dtype: torch.dtype
    row: int
    """The first one."""
    begin: int
    """Of the first row's bytes in the tensor."""
    num_bytes: int
    targets: Sequence[WeightTarget]


def load_pieces(
    wanted: Iterable[tuple[TensorInfo, Sequence[WeightTarget]]],
    checkpoint: Checkpoint,
    *,
    threads: int,
    progress: Progress,
) -> None:
    """Pass every target the rows of its tensor that it wants, in any order. Raises the first exception of
    a thread."""
    in_order = sorted(wanted, key=lambda item: item[0].position)  # of the disk
    pieces = [piece for info, targets in in_order for piece in _cut(info, targets)]
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
            queue.close()  # the other threads stop after their current piece


def _cut(info: TensorInfo, targets: Sequence[WeightTarget]) -> Iterator[_Piece]:
    if info.num_bytes == 0:
        return
    count = info.shape[0] if info.shape else 1
    row_bytes = info.num_bytes // count
    step = max(ROW_STEP, PIECE_BYTES // row_bytes // ROW_STEP * ROW_STEP)
    dtype, row_shape = getattr(torch, info.dtype, None), info.shape[1:]
    if dtype is None:
        dtype, row_shape = torch.uint8, (row_bytes,)
    for wanted in _runs(targets, count):
        for row in range(wanted.start, wanted.stop, step):
            rows = min(step, wanted.stop - row)
            yield _Piece(
                info=info,
                shape=(rows, *row_shape),
                dtype=dtype,
                row=row,
                begin=row * row_bytes,
                num_bytes=rows * row_bytes,
                targets=targets,
            )


def wanted_bytes(info: TensorInfo, targets: Sequence[WeightTarget]) -> int:
    """How many of a tensor's are read."""
    count = max(1, info.shape[0] if info.shape else 1)
    return sum(map(len, _runs(targets, count))) * (info.num_bytes // count)


def _runs(targets: Sequence[WeightTarget], count: int) -> Sequence[range]:
    """The rows that any target takes: a rank has three parts of a fused matrix."""
    runs: list[range] = []
    every = (range(count) if each.taken is None else each.taken[0] for each in targets)
    for rows in sorted(every, key=lambda rows: rows.start):
        if runs and rows.start <= runs[-1].stop:
            runs[-1] = range(runs[-1].start, max(rows.stop, runs[-1].stop))
        elif rows:
            runs.append(rows)
    return runs


class _Queue:
    """The remaining pieces, for all threads."""

    def __init__(self, pieces: Iterator[_Piece], progress: Progress) -> None:
        self._pieces = pieces
        self._progress = progress
        self._lock = threading.Lock()
        self._open = True

    def take(self, done: _Piece | None) -> _Piece | None:
        """Report the last piece as done, and return the next; None if there is none."""
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
            checkpoint.read(piece.info, piece.begin, view[: piece.num_bytes])
            rows = buffer[: piece.num_bytes].view(piece.dtype).view(piece.shape)
            for target in piece.targets:
                target.give(piece.row, rows)
            piece = queue.take(piece)
    except BaseException:
        queue.close()
        raise
