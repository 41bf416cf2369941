"""What would happen: traffic, through a router and replicas, to figures. See docs/simulate.md.

A fleet that is too large to be simulated whole is sampled in two ways, and the result says how far it may
be off. *Fewer replicas* get their share of the traffic, by whole conversations: each has the same load, but
the router has fewer to choose from. *Windows*, evenly over the time, each from an empty fleet and after a
warm-up: right as long as queues do not last from one to the next.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quire.config import EngineConfig, from_flat
from quire.engine.assemble import build_scheduler
from quire.engine.dry_run import ConfigOnly, Prepared, prepare
from quire.engine.memory import MemoryPlan
from quire.errors import ConfigError
from quire.plan.cost import StepTime
from quire.plan.devices import find_gpu, parse_gpus
from quire.plan.figures import Values, figures, parse_seconds, parse_slo
from quire.plan.fitted import FittedCost
from quire.plan.fleet import Fleet, Run
from quire.plan.model import Layout, find_model, place
from quire.plan.options import FleetOptions, ReportOptions, TrafficOptions, parse_sweep
from quire.plan.replica import Clock, Replica
from quire.plan.roofline import BOUND, PUBLISHED
from quire.plan.trace_files import read_trace
from quire.plan.traces import SHAPES, Arrivals, TraceRequest, at_rate, cut, generate
from quire.scheduler.cost_model import Work

GROUPS = 4
"""Into which windows are divided, by turns, to see how much the figures differ."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a replica is."""

    prepared: Prepared
    memory: MemoryPlan
    step: StepTime
    time_is: str
    """Where the time of a step is from: fitted, estimate or bound."""
    request_seconds: float
    price: float | None
    """Dollars an hour of a replica."""

    @property
    def config(self) -> EngineConfig:
        return self.prepared.config

    @property
    def max_in_flight(self) -> int:
        on_gpu = self.prepared.resolved.device == "cuda"
        return 2 if on_gpu and self.config.runtime.async_scheduling else 1

    def replica(self, options: FleetOptions, *, exact_ends: bool) -> Replica:
        clock = Clock()
        scheduler = build_scheduler(
            self.config,
            self.prepared.resolved.spec.kv,
            self.memory,
            gpu=self.prepared.resolved.device == "cuda",
            clock=clock,
        )
        return Replica(
            scheduler,
            clock,
            self.step,
            max_in_flight=self.max_in_flight,
            host_seconds=options.host_us / 1e6,
            jumps=options.jumps,
            exact_ends=exact_ends,
        )


class WithTokens:
    """A fitted step, and what the host does for each token that it samples."""

    is_bound = False

    def __init__(self, fitted: FittedCost) -> None:
        self._fitted = fitted

    def seconds(self, work: Work) -> float:
        return self._fitted.seconds(work) + self._fitted.token_seconds * work.rows


def find_device(values: Mapping[str, object], options: FleetOptions, price: float | None) -> Device:
    """values: of the engine, by flat name. Raises `ConfigError` or `ModelError`."""
    values = {**values, "decision_record_bytes": 0}  # nobody reads it, and jumps are not in it
    given = from_flat(values)
    for wrong, feature in (
        (given.parallel.pipeline_parallel_size > 1, "pipeline_parallel_size"),
        (given.max_drafts > 0, "speculative decoding"),
        (given.moves_kv, "KV outside the cache"),
        (given.parallel.data_parallel_size > 1, "data_parallel_size (use --replicas)"),
    ):
        if wrong:
            raise ConfigError(f"{feature} is not simulated.")
    fitted = None if options.cost is None else FittedCost.load(options.cost)
    name = values.get("model")
    if options.gpu is not None:
        kind, count = parse_gpus(options.gpu)
        gpu = find_gpu(kind, price=price)
        if options.device_memory is not None:
            gpu = replace(gpu, memory_bytes=options.device_memory)
        if not isinstance(name, str):
            raise ConfigError("with --gpu, name a model: --model DIRECTORY, hub id or known name.")
        count = count or given.parallel.tensor_parallel_size
        form = values.pop("quantization", None)
        layout = Layout(gpu, count, form if isinstance(form, str) else None)
        sized = place(find_model(name), layout, values)
        price = gpu.price * count
        if fitted is None:
            reached = BOUND if options.bound else PUBLISHED
            step, word = sized.time(reached), "bound" if options.bound else "estimate"
            return Device(sized.prepared, sized.memory, step, word, reached.request, price)
        prepared = sized.prepared
    else:
        source = None
        if isinstance(name, str):
            source = ConfigOnly(find_model(name).fields)
            given = from_flat({**values, "load_format": "dummy"})
        prepared = prepare(given, source, memory_bytes=options.device_memory)
    assert fitted is not None, "FleetOptions has checked it"
    step_time, delay = WithTokens(fitted), fitted.request_seconds
    return Device(prepared, prepared.memory_plan(), step_time, "fitted", delay, price)


# --- traffic --------------------------------------------------------------------------------------


def traffic(
    options: TrafficOptions, rate: float | None, *, longest: int, share: float = 1.0
) -> list[TraceRequest]:
    """share: of the conversations, all of whose requests are kept."""
    duration, name = parse_seconds(options.duration), options.trace
    if longest < 2:
        raise ConfigError(
            f"max_model_len {longest} has no room for a prompt and an answer; raise it."
        )
    if name in SHAPES:
        rate = rate or SHAPES[name].rate
        if not rate:
            raise ConfigError(f"{name} has no times of its own; give --rate.")
        arrivals = Arrivals(rate * share, duration, daily=options.daily)
        return list(generate(name, arrivals, seed=options.seed, longest=longest))
    if options.daily:
        raise ConfigError("daily is of generated traffic; a file has its own times.")
    requests = read_trace(name)
    if rate is not None:
        requests = at_rate(requests, rate)
    if share < 1:
        requests = [
            request
            for request in requests
            if random.Random(f"{options.seed}:{request.prompt[0][0]}").random() < share
        ]
    kept = [request for request in cut(requests, longest) if request.time < duration]
    if not kept:
        raise ConfigError(f"trace {name} has no request in the first {options.duration}.")
    return kept


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Simulation:
    device: Device
    traffic: TrafficOptions
    fleet: FleetOptions
    report: ReportOptions

    def run(self, rate: float | None = None) -> tuple[Values, list[Run]]:
        """At one rate; None: the given one, or the trace's."""
        rate = rate or self.traffic.rate
        count = self.fleet.sample_replicas or self.fleet.replicas
        share = count / self.fleet.replicas
        duration, since = parse_seconds(self.traffic.duration), parse_seconds(self.traffic.warmup)
        if self.fleet.sample_windows is not None:
            runs = self._windows(rate, count, share, since)
            window = since + parse_seconds(self.fleet.window)
            found = self._figures(runs, window, since, 1 / share, is_sample=True)
            return found | self._sample(runs, window, since, share), runs
        requests = traffic(self.traffic, rate, longest=self._longest, share=share)
        if self.traffic.trace not in SHAPES:
            duration = min(duration, requests[-1].time)
            if since and since >= duration:
                raise ConfigError(f"the trace ends at {duration:g} s, within the warmup.")
        runs = [self._run(requests, count, duration)]
        found = self._figures(runs, duration, since, 1 / share)
        if share < 1:
            found["sample"] = {"replicas": count}
        return found, runs

    @property
    def _longest(self) -> int:
        return self.device.memory.max_model_len

    def _run(self, requests: Sequence[TraceRequest], count: int, duration: float) -> Run:
        fleet = Fleet(
            lambda: self.device.replica(self.fleet, exact_ends=self.traffic.ignore_eos),
            count,
            routing=self.fleet.routing,
            autoscale=self.fleet.scaling,
            delay=self.device.request_seconds,
            seed=self.traffic.seed,
        )
        run = fleet.run(requests, duration)
        del fleet
        gc.collect()  # blocks and their contents name each other
        return run

    def _windows(self, rate: float | None, count: int, share: float, since: float) -> list[Run]:
        name, number = self.traffic.trace, self.fleet.sample_windows or 0
        shape = SHAPES.get(name)
        if shape is None or shape.in_bursts:
            raise ConfigError(f"windows are of generated traffic that comes evenly, not of {name}.")
        rate = rate or shape.rate
        if not rate:
            raise ConfigError(f"{name} has no times of its own; give --rate.")
        whole, window = parse_seconds(self.traffic.duration), parse_seconds(self.fleet.window)
        runs = []
        for index in range(number):
            start = (index + 0.5) * whole / number
            there = Arrivals(rate, whole, daily=self.traffic.daily).rate_at(start)
            arrivals = Arrivals(there * share, since + window)
            seed = self.traffic.seed * 1_000_003 + index
            requests = list(generate(name, arrivals, seed=seed, longest=self._longest))
            runs.append(self._run(requests, count, since + window))
        return runs

    def _figures(
        self, runs: Sequence[Run], duration: float, since: float, scale: float, *, is_sample: bool = False
    ) -> Values:  # fmt: skip
        slos = parse_slo(self.report.slo) if self.report.slo else None
        return figures(
            runs, duration=duration, since=since, scale=scale, is_sample=is_sample, slos=slos,
            price=self.device.price,
        )  # fmt: skip

    def _sample(
        self, runs: Sequence[Run], window: float, since: float, share: float
    ) -> dict[str, object]:
        """How far the sample may be off: the standard errors of figures, relative, from groups of windows."""
        parts = [
            self._figures(runs[index::GROUPS], window, since, 1 / share, is_sample=True)
            for index in range(GROUPS)
        ]
        late = [run.end > 2 * window for run in runs]
        errors = {
            name: _relative_error([_number(part, name) for part in parts])
            for name in ("ttft_ms.mean", "ttft_ms.p99", "itl_ms.mean", "itl_ms.p99", "e2e_ms.p99")
        }
        return {
            "sample": {
                "replicas": self.fleet.sample_replicas or self.fleet.replicas,
                "windows": len(runs),
                "standard_error": errors,
                "overloaded_windows": sum(late),
            }
        }

    def sweep(self) -> Values:
        """At each of the rates, and where it saturates."""
        assert self.traffic.sweep_rate is not None
        rates = parse_sweep(self.traffic.sweep_rate)
        points: list[Values] = [{"rate": rate} | self.run(rate)[0] for rate in rates]
        served = [_number(point, "steady.served") for point in points]
        beyond = [rate for rate, point in zip(rates, points, strict=True) if _is_saturated(point)]
        return {
            "points": points,
            "saturation_rate": max(served),
            "first_saturated_rate": beyond[0] if beyond else None,
        }

    def about(self) -> Values:
        """What was simulated."""
        memory, config = self.device.memory, self.device.config
        return {
            "model": config.model.model or "the built-in model",
            "step_time": self.device.time_is,
            "gpu": self.fleet.gpu,
            "trace": self.traffic.trace,
            "rate": self.traffic.rate,
            "duration": parse_seconds(self.traffic.duration),
            "seed": self.traffic.seed,
            "replicas": self.fleet.autoscale or self.fleet.replicas,
            "routing": self.fleet.routing,
            "max_num_seqs": config.scheduler.max_num_seqs,
            "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
            "max_model_len": memory.max_model_len,
            "kv_blocks": memory.num_blocks - 1,
            "block_size": memory.block_size,
            "max_in_flight": self.device.max_in_flight,
        }


def _number(values: Mapping[str, object], path: str) -> float:
    found: object = values
    for name in path.split("."):
        assert isinstance(found, Mapping)
        found = found[name]
    assert isinstance(found, int | float)
    return float(found)


def _is_saturated(point: Values) -> bool:
    state = point["steady"]
    assert isinstance(state, dict)
    return bool(state["is_saturated"])


def _relative_error(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return statistics.stdev(values) / math.sqrt(len(values)) / mean if mean else 0.0
