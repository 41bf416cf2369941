"""Which steps of a GPU are recorded as CUDA graphs, and which graph serves a step.

A step is padded to one of a few shapes, which are recorded: one launch instead of some three hundred. That is
for steps in which every row computes one token and samples (decoding), and for short mixed ones, where
launching takes longer than computing. Shapes are recorded when the engine is idle, or when one comes for the
third time.

Padding is without effect: its tokens have slot -1, so no keys are written; its rows have no tokens; what is
sampled for it has seat -1 and goes nowhere. So recordings can be tried out on no rows at all.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from quire.kernels.triton.sampling import DeviceTokens
from quire.runner.device import CannotRecordError, Device
from quire.runner.gpu_sampling import HARDNESS, Hardest

logger = logging.getLogger(__name__)

_USES_BEFORE_RECORDING = 2
MOST_GRAPH_ROWS = 256
GRAPH_TOKENS = (64, 128, 256, 512)
"""Tokens that mixed steps are padded to. Fewer than 64 take no less time: their products are bound by
reading the weights."""
LAUNCH_BOUND = 1 << 40
"""Weights times tokens up to which launching a step kernel by kernel takes about as long as computing it
(2 to 3 ms, at 800 TFLOP/s): the longest mixed steps worth recording. 512 tokens of a model of 0.6B, 128 of
8B, none of 70B."""


class StepShape(NamedTuple):
    """What the launches of a step depend on, and all of it."""

    rows: int
    tokens: int
    samples: int
    most_tokens: int
    """Of a row."""
    hardest: Hardest | None
    """None if it is sampled outside the graph."""


@dataclass(frozen=True, slots=True)
class Computed:
    """Of what is sampled, padding included."""

    hidden: Tensor
    """[samples, hidden_size]"""
    tokens: DeviceTokens | None
    """None if there are none, or the caller samples."""


Compute = Callable[[], Computed]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows that decoding steps are padded to."""
    return _up_to([1, 2, 4, *range(8, 64, 8), *range(64, 257, 16)], max_num_seqs)


def mixed_rows(max_num_seqs: int) -> list[int]:
    """Numbers of rows that mixed steps are padded to. Few, for an empty row costs little."""
    return _up_to([4, 16, 64, MOST_GRAPH_ROWS], max_num_seqs)


def mixed_tokens(num_weights: int, max_num_batched_tokens: int) -> list[int]:
    """Numbers of tokens that mixed steps are padded to."""
    sizes = [size for size in GRAPH_TOKENS if size * num_weights <= LAUNCH_BOUND]
    return _up_to(sizes, max_num_batched_tokens) if sizes else []


def _up_to(sizes: list[int], most: int) -> list[int]:
    """The sizes below `most`, and that if any is left out."""
    most = min(most, sizes[-1])
    return [size for size in sizes if size < most] + [most]


def _least(sizes: list[int], number: int) -> int | None:
    """The least of the sizes that holds so many."""
    index = bisect_left(sizes, number)
    return sizes[index] if index < len(sizes) else None


class Graphs:
    def __init__(
        self,
        device: Device,
        compute: Callable[[StepShape], Computed],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_weights: int,
        eager: bool,
    ) -> None:
        """compute: launches a shape kernel by kernel. eager: never record."""
        self._device = device
        self._compute = compute
        self._may_record = not eager
        self._decode_rows = graph_sizes(max_num_seqs)
        self._mixed_rows = mixed_rows(max_num_seqs)
        self._mixed_tokens = mixed_tokens(num_weights, max_num_batched_tokens)
        self.uses: dict[StepShape, int] = {}
        self.recorded: dict[StepShape, Compute] = {}

    def compute(self, exact: StepShape) -> Computed:
        """A step of this shape, padded where a graph may serve it."""
        shape = self._padded(exact)
        return self._compute(exact) if shape is None else self._work(shape)()

    def next(self) -> StepShape | None:
        """One that is worth recording: first those that came most often."""
        if not self._may_record:
            return None
        wanted = sorted(self.uses, key=self.uses.__getitem__, reverse=True)
        # "filter" does for all; downwards, since smaller graphs fit into the memory of larger ones.
        wanted += [_decoding(size, "filter") for size in reversed(self._decode_rows)]
        return next((shape for shape in wanted if shape not in self.recorded), None)

    def prepare(self, shape: StepShape) -> bool:
        """Record it, with nothing in flight. False if no more can be."""
        self._compute(shape)  # compiles and loads what is missing
        self._record(shape)
        return self._may_record

    def _record(self, shape: StepShape) -> Compute:
        work = partial(self._compute, shape)
        try:
            self.recorded[shape] = self._device.record(work)
        except CannotRecordError as error:
            logger.warning("no more than %d steps are recorded: %s", len(self.recorded), error)
            self._may_record = False
        return self.recorded.get(shape, work)

    def _padded(self, exact: StepShape) -> StepShape | None:
        """The shape of which the step may be recorded."""
        if exact.most_tokens == 1 and exact.samples == exact.rows:
            size = _least(self._decode_rows, exact.rows)
            return None if size is None else _decoding(size, exact.hardest)
        rows = _least(self._mixed_rows, max(exact.rows, exact.samples))
        tokens = _least(self._mixed_tokens, exact.tokens)
        if rows is None or tokens is None:
            return None
        return StepShape(rows, tokens, samples=rows, most_tokens=tokens, hardest=exact.hardest)

    def _work(self, shape: StepShape) -> Compute:
        """The CUDA graph of this shape; else one with a sampler that can do more, which gives the same
        tokens; else the launches one by one."""
        found = self.recorded.get(shape)
        if found is not None:
            return found
        uses = self.uses[shape] = self.uses.get(shape, 0) + 1
        if shape.hardest is not None:
            for harder in HARDNESS[HARDNESS.index(shape.hardest) + 1 :]:
                found = self.recorded.get(shape._replace(hardest=harder))
                if found is not None:
                    return found
        if self._may_record and uses > _USES_BEFORE_RECORDING:
            return self._record(shape)
        return partial(self._compute, shape)


def _decoding(size: int, hardest: Hardest | None) -> StepShape:
    return StepShape(size, size, samples=size, most_tokens=1, hardest=hardest)
