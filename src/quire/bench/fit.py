"""Fits the seconds of steps (`scheduler/fitted.py`) to those that were measured (`bench/fit_grid.py`).

It is a least-squares fit of relative errors, robust to a few that are far off, in which no coefficient is
negative. The curve is given by what it rises between its sizes, so that it never falls. A fifth of the cells
is held out, and the error reported is theirs; what is written is then fitted to all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quire.bench.fit_grid import Cell
from quire.bench.record import run_record
from quire.config import EngineConfig
from quire.engine.setup import ResolvedModel
from quire.errors import EngineError
from quire.scheduler.fitted import FittedCost
from quire.util.cores import default_threads

SIZES = (1, 2, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 1024)
"""At which the curve may bend. Kernels that take four rows at a time have a step after four."""
DISTURBED, PASSES = 0.05, 4
"""A cell counts less the further it is off beyond this: another program may have run."""
HELD_OUT, LEAST_CELLS = 5, 24
"""One cell in so many."""
Array = NDArray[np.float64]


def facts(config: EngineConfig, resolved: ResolvedModel) -> dict[str, object]:
    """Where it was measured, for `FittedCost.about`."""
    options = config.scheduler
    return {
        "model": config.model.served_model_name[0],
        "device": resolved.device,
        "dtype": resolved.dtype,
        "kv_cache_dtype": resolved.kv_cache_dtype,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "threads": config.runtime.cpu_threads or default_threads(),
        "pipeline_parallel_size": config.parallel.pipeline_parallel_size,
    } | run_record()


def fit(
    cells: Sequence[Cell], *, about: Mapping[str, object] | None = None, seed: int = 0
) -> FittedCost:
    """Raises `EngineError` if there are too few steps."""
    if len(cells) < LEAST_CELLS:
        raise EngineError(
            f"{len(cells)} different steps are too few to fit; allow longer requests, or more of them."
        )
    order = np.random.default_rng(seed).permutation(len(cells))
    held = [cells[index] for index in order[::HELD_OUT]]
    kept = [cells[index] for place, index in enumerate(order) if place % HELD_OUT]
    return replace(_fit(cells), errors=errors(_fit(kept), held), about=about or {})


def errors(cost: FittedCost, cells: Sequence[Cell]) -> dict[str, float]:
    """Mean absolute relative error, by kind and of all."""
    found: dict[str, list[float]] = {"all": []}
    for cell in cells:
        error = abs(cost.seconds(cell.work) / cell.seconds - 1)
        found["all"].append(error)
        found.setdefault(cell.kind, []).append(error)
    return {kind: float(np.mean(values)) for kind, values in sorted(found.items())}


def _fit(cells: Sequence[Cell]) -> FittedCost:
    work = np.array([cell.work for cell in cells], dtype=float)
    seconds = np.array([cell.seconds for cell in cells])
    most = float(np.max(work[:, 0] + work[:, 3]))
    sizes = [float(size) for size in SIZES if size < most] + [most]
    columns = np.column_stack([_columns(work), _rises(work[:, 0] + work[:, 3], sizes)])
    relative, weights = columns / seconds[:, None], np.ones(len(cells))
    for _ in range(PASSES):
        found = nnls(relative * weights[:, None], weights)
        off = np.abs(relative @ found - 1)
        weights = np.sqrt(DISTURBED / np.maximum(off, DISTURBED))
    row, context, prompt_context, prompt_step, first, *rises = found.tolist()
    curve = np.cumsum([first, *rises])
    return FittedCost(
        tuple(sizes), tuple(curve.tolist()), row, context, prompt_context, prompt_step
    )


def _columns(work: Array) -> Array:
    rows, contexts, constant, prompts, prompt_contexts = work.T
    return np.column_stack([rows, contexts, prompt_contexts, prompts > 0, constant])


def _rises(tokens: Array, sizes: Sequence[float]) -> Array:
    """For each stretch of the curve, the part of it that lies below so many tokens; of the last, also more
    than all of it."""
    columns = []
    for low, high in pairwise(sizes):
        part = np.maximum((tokens - low) / (high - low), 0.0)
        columns.append(part if high == sizes[-1] else np.minimum(part, 1.0))
    return np.column_stack(columns)


def nnls(matrix: Array, right: Array) -> Array:
    """The x >= 0 for which |matrix @ x - right| is least: Lawson and Hanson, Solving Least Squares Problems
    (1974), chapter 23. matrix: [equations, unknowns]."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0.0] = 1.0
    matrix = matrix / scale
    size = matrix.shape[1]
    x, is_free = np.zeros(size), np.zeros(size, dtype=bool)
    for _ in range(10 * size):
        gradient = matrix.T @ (right - matrix @ x)
        gradient[is_free] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-9 * np.linalg.norm(right):
            break
        is_free[best] = True
        while True:
            wanted = np.zeros(size)
            wanted[is_free] = np.linalg.lstsq(matrix[:, is_free], right, rcond=None)[0]
            bad = is_free & (wanted <= 0.0)
            if not bad.any():
                x = wanted
                break
            step = float(np.min(x[bad] / (x[bad] - wanted[bad])))
            x = x + step * (wanted - x)
            is_free &= x > 1e-14
            x[~is_free] = 0.0
    return x / scale


def table(cost: FittedCost, cells: Sequence[Cell]) -> list[str]:
    """What was measured and what the fit says, for some cells of each kind."""
    kinds: Mapping[str, list[Cell]] = {
        kind: [cell for cell in cells if cell.kind == kind]
        for kind in ("decode", "prefill", "mixed")
    }
    lines = [
        f"{'step':<9}{'rows':>6}{'context':>9}{'prompts':>9}{'ms':>10}{'fitted':>10}{'off':>7}"
    ]
    for kind, mine in kinds.items():
        for cell in mine[:: max(1, len(mine) // 8)]:
            rows, contexts, _, prompts, _ = cell.work
            said = cost.seconds(cell.work)
            lines.append(
                f"{kind:<9}{rows:>6.0f}{contexts / max(rows, 1.0):>9.0f}{prompts:>9.0f}"
                f"{1000 * cell.seconds:>10.3f}{1000 * said:>10.3f}{said / cell.seconds - 1:>7.0%}"
            )
    return lines
