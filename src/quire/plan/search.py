"""The cheapest layout that meets an SLO at a rate: every GPU, number of ranks and weight format is tried.

A layout's replicas are as many as the rate needs, each at the highest rate at which the estimate of `load`
meets the SLO: it is found by bisection, since latencies rise with the number of running requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from quire.errors import ConfigError, MemoryFitError, ModelError
from quire.plan.devices import Gpu
from quire.plan.load import Lengths, Point, Replica
from quire.plan.model import Layout, Model, Sized, place
from quire.plan.roofline import PUBLISHED, Efficiency

RANKS = (1, 2, 4, 8)
FORMATS = (None, "fp8", "awq")
"""That are tried if none is given: a checkpoint as it is, and the two that users find on the hub."""
BUDGETS = (2048, 1024, 512)
"""max_num_batched_tokens that are tried if none is given: small GPUs' default, and less for a shorter ITL."""
FEWEST, LEAST_LOAD, HIGHEST_LOAD = 0.01, 0.01, 0.98
"""Running requests, in the mean; and their shares of the most: with the least there is no queue, and beyond
the highest waits grow without end."""
WORTH = 0.9
"""Of the highest rate: the largest budget that reaches it is taken."""
SLO_KEYS = {"ttft": "ttft_p99", "itl": "itl_p99", "tpot": "itl"}
"""Of --slo -> the field of `Point` that must not exceed it. ttft and itl are p99s; tpot is a mean."""
NAMES = {"ttft": "p99 of TTFT", "itl": "p99 of ITL", "tpot": "mean ITL"}


@dataclass(frozen=True, slots=True)
class Wish:
    lengths: Lengths
    rate: float | None
    """Requests a second, of all replicas; None: what one replica serves."""
    slo: Mapping[str, float]
    """In seconds, by the keys of `SLO_KEYS`."""

    def missed(self, point: Point) -> str | None:
        """The first part of the SLO that is not met, in words."""
        for key, most in self.slo.items():
            value = getattr(point, SLO_KEYS[key])
            if value > most:
                return f"{NAMES[key]} {value * 1e3:,.0f} ms > {most * 1e3:,.0f}"
        return None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout, and why it is refused or what it costs."""

    layout: Layout
    refused: str | None
    replicas: int = 0
    budget: int = 0
    """max_num_batched_tokens."""
    most_rate: float = 0.0
    """Of one replica, within the SLO."""
    point: Point | None = None
    """Of one replica, at its share of the rate."""

    @property
    def gpus(self) -> int:
        return self.replicas * self.layout.tensor_parallel

    @property
    def dollars(self) -> float:
        """An hour."""
        return self.gpus * self.layout.gpu.price

    @property
    def request_dollars(self) -> float:
        """For a request, if each replica has its highest rate within the SLO."""
        return self.dollars / 3600 / (self.most_rate * self.replicas)


def parse_slo(text: str) -> dict[str, float]:
    """ "ttft=500ms,itl=50ms" -> seconds, by name. Raises `ConfigError`."""
    found: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in SLO_KEYS or key in found:
            raise ConfigError(
                f"slo {part.strip()!r}: it must be {', '.join(f'{each}=TIME' for each in SLO_KEYS)}, "
                "each at most once, with times such as 500ms or 0.5s."
            )
        found[key] = _seconds(part.strip(), value)
    return found


def _seconds(part: str, text: str) -> float:
    digits, factor = (text[:-2], 1e-3) if text.endswith("ms") else (text[:-1], 1.0)
    try:
        found = float(digits) * factor if text.endswith("s") else math.nan
    except ValueError:
        found = math.nan
    if not 0.0 < found < math.inf:
        raise ConfigError(f"slo {part!r}: the time must be such as 500ms or 0.5s.")
    return found


def replica_of(sized: Sized, lengths: Lengths, efficiency: Efficiency = PUBLISHED) -> Replica:
    """Raises `MemoryFitError`."""
    options = sized.prepared.config.scheduler
    return Replica(
        sized.time(efficiency),
        lengths,
        min(options.max_num_seqs, sized.sequences(lengths.total)),
        options.max_num_batched_tokens,
        efficiency.request,
        ahead=1.0 if sized.prepared.config.runtime.async_scheduling else 0.0,
    )


def candidates(
    model: Model,
    gpus: Sequence[Gpu],
    formats: Sequence[str | None],
    wish: Wish,
    options: Mapping[str, object],
) -> list[Candidate]:
    """Those that meet the SLO, the cheapest first (for the rate, or without one for a request), then those
    that are refused."""
    found = [judge(model, layout, wish, options) for layout in layouts(gpus, formats)]

    def order(each: Candidate) -> tuple[bool, float, int]:
        unit = each.dollars if wish.rate is not None or not each.most_rate else each.request_dollars
        return each.refused is not None, unit, each.gpus

    return sorted(found, key=order)


def layouts(gpus: Sequence[Gpu], formats: Sequence[str | None]) -> Iterator[Layout]:
    for gpu in gpus:
        for ranks in RANKS:
            for form in formats:
                yield Layout(gpu, ranks, form)


def judge(model: Model, layout: Layout, wish: Wish, options: Mapping[str, object]) -> Candidate:
    """Raises `ConfigError` for what no layout can serve."""
    sized = place(model, layout, options)
    try:
        replica = replica_of(sized, wish.lengths)
    except MemoryFitError:
        return Candidate(layout, _too_small(sized))
    except ConfigError as error:
        if "tensor_parallel_size" not in str(error):
            raise
        return Candidate(layout, f"its heads cannot be divided among {layout.tensor_parallel}")
    except ModelError as error:  # a matrix that cannot be stored in the format
        return Candidate(layout, str(error))
    given = "max_num_batched_tokens" in options
    tried = [replica] if given else [replace(replica, budget=budget) for budget in BUDGETS]
    found = [(each, most) for each in tried if (most := most_rows(each, wish)) is not None]
    if not found:
        missed = wish.missed(tried[-1].with_rows(fewest_rows(tried[-1])))
        return Candidate(layout, f"even with one request at a time: {missed}")
    rates = [(each, each.with_rows(most).rate) for each, most in found]
    enough = WORTH * max(rate for _, rate in rates)
    replica, best = next(pair for pair in rates if pair[1] >= enough)
    rate = best if wish.rate is None else wish.rate
    replicas = max(1, math.ceil(rate / best - 1e-9))
    point = replica.at(rate / replicas)
    return Candidate(layout, None, replicas, replica.budget, best, point)


def fewest_rows(replica: Replica) -> float:
    """One request at a time: of long prompts with short answers, `FEWEST` may be more than fit."""
    return min(FEWEST, LEAST_LOAD * replica.most_rows)


def most_rows(replica: Replica, wish: Wish) -> float | None:
    """The most running requests at which the SLO is met; None: it is not met with any."""
    low, high = fewest_rows(replica), replica.most_rows * HIGHEST_LOAD
    if wish.missed(replica.with_rows(low)):
        return None
    if not wish.missed(replica.with_rows(high)):
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if wish.missed(replica.with_rows(middle)) else (middle, high)
    return low


def fewest_ranks(model: Model, gpu: Gpu, form: str | None, options: Mapping[str, object]) -> int:
    """That hold the model and a sequence; if none do, the most."""
    for ranks in RANKS:
        try:
            if place(model, Layout(gpu, ranks, form), options).memory:
                return ranks
        except MemoryFitError:
            continue
    return RANKS[-1]


def _too_small(sized: Sized) -> str:
    gib, rank = 2.0**30, sized.rank
    needs = (rank.weight_bytes + rank.step_bytes) / gib
    length = sized.prepared.resolved.max_model_len
    left = sized.kv_budget / gib
    if left <= 0:
        return f"weights and activations, {needs:.1f} GiB, do not fit {rank.memory.total / gib:.1f}"
    return f"{left:.1f} GiB are left for KV: not one sequence of {length:,} tokens"
