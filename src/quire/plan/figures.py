"""From requests and their times to the usual figures. Definitions are those of `quire bench serve`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quire.errors import ConfigError
from quire.plan.fleet import Run
from quire.plan.histogram import Histogram, percentile
from quire.plan.replica import Life

PERCENTILES = (50, 90, 95, 99)
SERVED = 0.97
"""Of the requests that come, the share that is served before a fleet may count as saturated."""
OBJECTIVES = ("ttft", "itl", "tpot", "e2e")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

Values = dict[str, object]


def ttft(life: Life) -> float:
    return life.first - life.request.time


def e2e(life: Life) -> float:
    return life.last - life.request.time


def tpot(life: Life) -> float:
    """The mean gap between its tokens."""
    return (life.last - life.first) / (life.made - 1) if life.made > 1 else 0.0


def figures(
    runs: Sequence[Run],
    *,
    duration: float,
    since: float = 0.0,
    scale: float = 1.0,
    is_sample: bool = False,
    slos: Mapping[str, float] | None = None,
    price: float | None = None,
) -> Values:
    """Of runs of the same length, taken together.

    duration: seconds in which requests came, of one run. since: requests that came before do not count.
    scale: how many times more replicas there are than were simulated. is_sample: the runs are windows of a
    longer time, so their ends do not count. price: dollars an hour of a replica.
    """
    lives = [life for run in runs for life in run.lives if life.request.time >= since]
    gaps = Histogram()
    for run in runs:
        gaps.merge(run.gaps)
    ends = [duration if is_sample else run.elapsed for run in runs]
    seconds = sum(ends) - since * len(runs)
    prompt = sum(life.request.prompt_len for life in lives)
    output = sum(life.made for life in lives)
    paid = sum(run.paid for run in runs)
    replicas = paid / sum(run.elapsed for run in runs)
    result: Values = {
        "requests": len(lives),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "requests_per_second": len(lives) * scale / seconds,
        "output_tokens_per_second": output * scale / seconds,
        "tokens_per_second": (prompt + output) * scale / seconds,
        "steady": steady(runs, duration, since, scale),
    }
    if slos:
        good = sum(meets(life, slos) for life in lives)
        result["goodput"] = good * scale / seconds
        result["meet_slo"] = good / len(lives) if lives else 0.0
    result |= {
        "ttft_ms": statistics([ttft(life) for life in lives]),
        "tpot_ms": statistics([tpot(life) for life in lives if life.made > 1]),
        "itl_ms": {
            "mean": gaps.mean * 1e3,
            **{f"p{each}": gaps.percentile(each) * 1e3 for each in PERCENTILES},
        },
        "e2e_ms": statistics([e2e(life) for life in lives]),
        "queue_ms": statistics([life.admitted - life.request.time for life in lives]),
        "preemptions": sum(life.preemptions for life in lives),
        "cache_hit_rate": sum(life.cached for life in lives) / prompt if prompt else 0.0,
        "replicas": replicas * scale,
    }
    counts, blocks = [run.counts for run in runs], paid * runs[0].num_blocks
    result |= {
        "busy": sum(count.busy for count in counts) / paid,
        "kv_usage": sum(count.block_seconds for count in counts) / blocks,
        "kv_usage_peak": max(count.most_blocks for count in counts) / runs[0].num_blocks,
        "steps": sum(count.steps for count in counts),
        "jumped_steps": sum(count.jumped for count in counts),
    }
    if price is not None:
        result["cost"] = _cost(price * replicas * seconds / 3600, prompt, output)
    return result


def _cost(dollars: float, prompt: int, output: int) -> Values:
    millions = output / 1e6, (prompt + output) / 1e6
    return {
        "per_million_output_tokens": dollars / millions[0] if output else 0.0,
        "per_million_tokens": dollars / millions[1] if output else 0.0,
    }


def steady(runs: Sequence[Run], duration: float, since: float, scale: float) -> dict[str, object]:
    """Requests per second that came, and that ended, after a quarter of the time in which they came. If it is
    saturated, fewer end than come, and they wait longer and longer."""
    quarter = (duration - since) / 4
    lives = [life for run in runs for life in run.lives]

    def queue(number: int) -> float:
        start = since + number * quarter
        mine = [each for each in lives if start <= each.request.time < start + quarter]
        return sum(each.admitted - each.request.time for each in mine) / max(1, len(mine))

    start = since + quarter
    came = sum(start <= life.request.time < duration for life in lives)
    ended = sum(start <= life.last < duration for life in lives)
    seconds = len(runs) * 3 * quarter
    per_second = scale / seconds if seconds else 0.0  # all came at once
    return {
        "offered": came * per_second,
        "served": ended * per_second,
        "is_saturated": ended < SERVED * came and queue(3) > 2 * queue(1) + 0.1,
    }


def statistics(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    seconds.sort()
    mean = math.fsum(seconds) / len(seconds) if seconds else 0.0
    values = {"mean": mean * 1e3}
    return values | {f"p{each}": percentile(seconds, each) * 1e3 for each in PERCENTILES}


def meets(life: Life, slos: Mapping[str, float]) -> bool:
    """itl: of the mean gap between the tokens of a request, which is its TPOT."""
    found = {"ttft": ttft, "itl": tpot, "tpot": tpot, "e2e": e2e}
    return all(found[name](life) <= limit for name, limit in slos.items())


def parse_seconds(text: str) -> float:
    """500ms, 2s, 10m, 1.5h, 1d; seconds without a unit. Raises `ConfigError`."""
    number = text.strip().rstrip("smhd")
    unit = text.strip()[len(number) :] or "s"
    try:
        value = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"expected a time such as 500ms, 2s, 10m, 1h or 1d, got {text!r}.")
    return value


def parse_slo(text: str) -> dict[str, float]:
    """ttft=500ms,itl=50ms. Raises `ConfigError`."""
    slos: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name.strip() not in OBJECTIVES:
            raise ConfigError(
                f"slo must be NAME=TIME with NAME one of {', '.join(OBJECTIVES)}, got {part!r}."
            )
        slos[name.strip()] = parse_seconds(value)
    return slos
