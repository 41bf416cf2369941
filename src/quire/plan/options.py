"""The options of `quire simulate`: a field is a flag and a row of docs/simulate-options.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quire.config.options import OptionInfo, describe, option, parse_size
from quire.errors import ConfigError
from quire.plan.figures import parse_seconds, parse_slo
from quire.plan.fleet import ROUTINGS, Autoscale
from quire.plan.traces import SHAPES

MOST_REPLICAS = 100_000


def parse_sweep(text: str) -> tuple[float, ...]:
    """ "2:10:2": from, to, step."""
    try:
        low, high, step = (float(part) for part in text.split(":"))
    except ValueError:
        low = high = step = 0.0
    if not 0 < low <= high < 1e9 or not step > 0 or (high - low) / step > 1000:
        raise ConfigError(f"expected FROM:TO:STEP, such as 2:10:2, got {text!r}.")
    return tuple(low + step * index for index in range(int((high - low) / step + 1e-9) + 1))


def _sweep(text: str) -> str:
    parse_sweep(text)
    return text


def _slo(text: str) -> str:
    parse_slo(text)
    return text


def _seconds(text: str) -> str:
    parse_seconds(text)
    return text


@dataclass(frozen=True, slots=True)
class TrafficOptions:
    """What comes."""

    trace: str = option(
        "azure-conv",
        f"Traffic: {', '.join(SHAPES)}, made from the lengths and gaps of public traces; or a file: CSV of "
        "Azure's form, JSONL of Mooncake's, a request log, or the result of bench serve --save-detailed.",
        metavar="NAME|FILE",
    )
    rate: float | None = option(
        None, "Requests per second, of all replicas together. Default: the trace's own."
    )
    duration: str = option(
        "10m", "How long requests come. A file may end sooner.", parse=_seconds, metavar="TIME"
    )
    daily: float = option(
        0.0, "The rate follows a day that begins at midnight: this share above the mean at 14 o'clock, and "
        "below at 2; in [0, 1).",
    )  # fmt: skip
    sweep_rate: str | None = option(
        None, "Simulate at several rates, and say where it saturates.", parse=_sweep,
        metavar="FROM:TO:STEP",
    )  # fmt: skip
    ignore_eos: bool = option(
        False,
        "The scheduler knows how long answers become, as of a benchmark; else they end by a token.",
    )
    warmup: str = option(
        "0s", "Requests of the first seconds do not count.", parse=_seconds, metavar="TIME"
    )
    seed: int = option(0, "Of lengths, arrivals and random routing.")

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ConfigError(f"rate must be more than 0 requests per second, got {self.rate}.")
        if not 0 <= parse_seconds(self.warmup) < parse_seconds(self.duration):
            raise ConfigError(
                f"duration ({self.duration}) must be more than warmup ({self.warmup}): what comes after "
                "it is counted."
            )


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What serves it."""

    gpu: str | None = option(
        None, "A replica's GPUs, such as h100:2 (tensor parallel). Without --cost, a step takes what others "
        "have measured of the data sheet: an estimate.", metavar="NAME[:N]",
    )  # fmt: skip
    bound: bool = option(
        False, "With --gpu: a step takes the least that the data sheet allows, a bound."
    )
    cost: str | None = option(
        None, "A step takes what `quire bench fit` has measured and fitted.", metavar="FILE"
    )
    device_memory: int | None = option(
        None, "Bytes of each device, or of the machine. Default: the GPU's, or what is here.",
        parse=parse_size, metavar="SIZE",
    )  # fmt: skip
    host_us: float = option(
        0.0, "Microseconds of the host between steps, beside what a step counts. Hidden behind the device "
        "with --async-scheduling on a GPU.",
    )  # fmt: skip
    replicas: int = option(1, "Replicas.")
    routing: str = option(
        "prefix", "Who gets a request: Quire's router, the least load alone, by turns, or by chance.",
        choices=ROUTINGS,
    )  # fmt: skip
    autoscale: str | None = option(
        None, "As many replicas as requests need, instead of --replicas.", metavar="LEAST:MOST"
    )
    autoscale_target: float = option(
        32.0, "Requests, running or waiting, for which one replica is wanted."
    )
    start_delay: str = option("60s", "Until a new replica serves.", parse=_seconds, metavar="TIME")
    patience: str = option(
        "5m", "Replicas are given up if fewer were needed for so long.", parse=_seconds, metavar="TIME"
    )  # fmt: skip
    sample_replicas: int | None = option(
        None, "Simulate only so many of the replicas, with their share of the traffic."
    )
    sample_windows: int | None = option(
        None, "Simulate only so many windows, evenly over the duration (of generated traffic)."
    )
    window: str = option(
        "60s", "Seconds of a window, after --warmup.", parse=_seconds, metavar="TIME"
    )
    jumps: bool = option(True, "Carry out steps in which nothing is decided at once.")

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas must be at least 1, got {self.replicas}.")
        if not 0 <= self.host_us < math.inf:
            raise ConfigError(f"host_us must be 0 or more microseconds, got {self.host_us}.")
        if not parse_seconds(self.window) > 0:
            raise ConfigError(f"window must be more than 0, got {self.window}.")
        if self.device_memory is not None and self.device_memory < 1:
            raise ConfigError(f"device_memory must be at least 1, got {self.device_memory}.")
        if self.sample_replicas is not None and not 1 <= self.sample_replicas <= self.replicas:
            raise ConfigError(
                f"sample_replicas must be in [1, replicas], got {self.sample_replicas}."
            )
        if (self.sample_replicas or self.replicas) > MOST_REPLICAS:
            raise ConfigError(
                f"at most {MOST_REPLICAS:,} replicas are simulated; give sample_replicas for more."
            )
        if self.sample_windows is not None and self.sample_windows < 4:
            raise ConfigError(f"sample_windows must be at least 4, got {self.sample_windows}.")
        if self.autoscale is not None and (self.sample_windows or self.sample_replicas):
            raise ConfigError("autoscale follows the whole traffic; remove the sample options.")
        if self.gpu is None and self.cost is None:
            raise ConfigError(
                "how long does a step take? Give --gpu NAME, or --cost FILE of quire bench fit."
            )
        if self.bound and (self.gpu is None or self.cost is not None):
            raise ConfigError("bound is of a data sheet: give --gpu, and not --cost.")
        _ = self.scaling

    @property
    def scaling(self) -> Autoscale | None:
        if self.autoscale is None:
            return None
        least, _, most = self.autoscale.partition(":")
        if not (least.isdecimal() and most.isdecimal()):
            raise ConfigError(f"autoscale must be LEAST:MOST, got {self.autoscale!r}.")
        return Autoscale(
            int(least), int(most), self.autoscale_target,
            start_delay=parse_seconds(self.start_delay), patience=parse_seconds(self.patience),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What is said of it."""

    slo: str | None = option(
        None, "Objectives of each request: ttft, itl (its mean), tpot, e2e; for goodput.", parse=_slo,
        metavar="ttft=500ms,itl=50ms",
    )  # fmt: skip
    gpu_price: float | None = option(
        None, "Dollars an hour of one GPU. Default: the table's of --gpu."
    )
    json: str | None = option(None, "Write all figures there.", metavar="FILE")
    plot: str | None = option(
        None, "Picture: of a sweep, latency against rate; else distributions.", metavar="FILE.svg"
    )


GROUPS: dict[str, type] = {
    "traffic": TrafficOptions,
    "fleet": FleetOptions,
    "report": ReportOptions,
}


def simulate_options() -> list[OptionInfo]:
    return [info for name, group in GROUPS.items() for info in describe(group, name)]
