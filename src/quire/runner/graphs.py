"""The CUDA graphs of steps: which are captured, and which one is used for a step.

A step is padded to one of a few shapes, for which a graph is captured: one launch instead of some three
hundred. This is done for steps in which every row computes one token and samples (decoding), and for
short mixed ones, where launching takes longer than computing. Graphs are captured when the engine is
idle, or when a shape occurs for the third time.

Padding has no effect: its tokens have slot -1, so no keys are written; its rows have no tokens; its
samples have seat -1 and are dropped. So a graph can be captured with no rows at all.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from quire.kernels.triton.sampling import SAMPLER_LEVELS, DeviceTokens, SamplerLevel
from quire.runner.device import CannotRecordError, Device

logger = logging.getLogger(__name__)

_USES_BEFORE_RECORDING = 2
GRAPH_TOKENS = (64, 128, 256, 512, 1024, 2048)
"""Numbers of tokens to which mixed steps are padded. Fewer than 64 take as long, since products are then
limited by reading the weights."""
MOST_PADDING = 4
"""Rows or tokens of a graph per row or token of a step, if the step's own size has no graph yet. Few rows
take nearly as long as four times as many, since both read all weights."""
LAUNCH_BOUND = 1 << 41
"""Number of weights times tokens up to which launching a step kernel by kernel takes about as long as
computing it (5 to 6 ms, at 800 TFLOP/s): the longest mixed steps for which graphs are captured. 2048
tokens for a model of 0.6B, 256 for 8B, none for 70B."""


class StepShape(NamedTuple):
    """Everything that the launches of a step depend on."""

    rows: int
    tokens: int
    samples: int
    most_tokens: int
    """The largest number of tokens of a row."""
    level: SamplerLevel | None
    """Sampler level; None if it is sampled outside the graph."""
    adapted: bool = False
    """Whether any row has a LoRA adapter: else its kernels are not launched."""
    least_tokens: int = 1
    """The smallest number of tokens of a row; 1 where a graph is used, whose rows may have any."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The results of a step, padding included."""

    hidden: Tensor
    """[samples, hidden_size]"""
    tokens: DeviceTokens | None
    """None if there are none, or the caller samples."""


Compute = Callable[[], Computed]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows to which decoding steps are padded."""
    few = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16)]
    return _up_to([*few, *range(256, max(256, max_num_seqs) + 32, 32)], max_num_seqs)


def mixed_rows(max_num_seqs: int) -> list[int]:
    """Numbers of rows to which mixed steps are padded. Few, because an empty row costs little."""
    return _up_to([4, 16, 64, 256, max(256, max_num_seqs)], max_num_seqs)


def mixed_tokens(num_weights: int, max_num_batched_tokens: int) -> list[int]:
    """Numbers of tokens to which mixed steps are padded."""
    sizes = [size for size in GRAPH_TOKENS if size * num_weights <= LAUNCH_BOUND]
    return _up_to(sizes, max_num_batched_tokens) if sizes else []


def _up_to(sizes: list[int], most: int) -> list[int]:
    """The sizes up to `most`; and `most` itself, if a larger size is left out."""
    most = min(most, sizes[-1])
    return [size for size in sizes if size < most] + [most]


def _least(sizes: list[int], number: int) -> int | None:
    """The smallest size that is large enough."""
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
        """compute: launches a shape kernel by kernel. eager: capture no graphs."""
        self._device = device
        self._compute = compute
        self._may_record = not eager
        self._decode_rows = graph_sizes(max_num_seqs)
        self._mixed_rows = mixed_rows(max_num_seqs)
        self._mixed_tokens = mixed_tokens(num_weights, max_num_batched_tokens)
        self.uses: dict[StepShape, int] = {}
        self.recorded: dict[StepShape, Compute] = {}

    def compute(self, exact: StepShape) -> Computed:
        """Compute a step of this shape, padded if it can use a graph."""
        shape = self._padded(exact)
        return self._compute(exact) if shape is None else self._work(shape)()

    def next(self) -> StepShape | None:
        """The next shape to capture: first those that occurred most often."""
        if not self._may_record:
            return None
        wanted = sorted(self.uses, key=self.uses.__getitem__, reverse=True)
        # "filter" does for all; downwards, since smaller graphs fit into the memory of larger ones.
        wanted += [_decoding(size, "filter") for size in reversed(self._decode_rows)]
        return next((shape for shape in wanted if shape not in self.recorded), None)

    def prepare(self, shape: StepShape) -> bool:
        """Capture a graph, with no step in flight. Returns False if no more can be captured."""
        self._compute(shape)  # compiles and loads missing kernels
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
        """The padded shape for the step; None if it can have no graph."""
        if exact.most_tokens == 1 and exact.samples == exact.rows:
            size = _least(self._decode_rows, exact.rows)
            return None if size is None else _decoding(size, exact.level, exact.adapted)
        rows = _least(self._mixed_rows, max(exact.rows, exact.samples))
        tokens = _least(self._mixed_tokens, exact.tokens)
        if rows is None or tokens is None:
            return None
        return exact._replace(
            rows=rows, tokens=tokens, samples=rows, most_tokens=tokens, least_tokens=1
        )

    def _work(self, shape: StepShape) -> Compute:
        """The CUDA graph for this shape; else one that does for it; else eager launches."""
        found = self.recorded.get(shape)
        if found is not None:
            return found
        uses = self.uses[shape] = self.uses.get(shape, 0) + 1
        found = self._superset(shape)
        if found is not None:
            return found
        if self._may_record and uses > _USES_BEFORE_RECORDING:
            return self._record(shape)
        return partial(self._compute, shape)

    def _superset(self, shape: StepShape) -> Compute | None:
        """A graph with a sampler of a higher level, which gives the same tokens, or with more padding. A
        capture stops all requests for some 50 ms, so under a load it is a last resort."""
        levels: tuple[SamplerLevel | None, ...] = (None,)
        if shape.level is not None:
            levels = SAMPLER_LEVELS[SAMPLER_LEVELS.index(shape.level) :]
        decodes = shape.most_tokens == 1
        for rows in _larger(self._decode_rows if decodes else self._mixed_rows, shape.rows):
            for tokens in [rows] if decodes else _larger(self._mixed_tokens, shape.tokens):
                most = 1 if decodes else tokens
                for level in levels:
                    other = StepShape(rows, tokens, rows, most, level, shape.adapted)
                    if (found := self.recorded.get(other)) is not None:
                        return found
        return None


def _larger(sizes: list[int], number: int) -> list[int]:
    """The sizes from a number up to four times of it."""
    return [size for size in sizes if number <= size <= MOST_PADDING * number]


def _decoding(size: int, level: SamplerLevel | None, adapted: bool = False) -> StepShape:
    return StepShape(size, size, samples=size, most_tokens=1, level=level, adapted=adapted)
