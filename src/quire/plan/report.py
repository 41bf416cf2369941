"""What `quire plan` says of one layout, as figures: each has a value, a unit, and a formula with values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from quire.dtypes import element_bytes
from quire.engine.memory import format_bytes
from quire.errors import MemoryFitError
from quire.plan.cost import StepTime
from quire.plan.devices import Gpu
from quire.plan.fitted import FittedCost
from quire.plan.load import Point, Replica
from quire.plan.model import Sized
from quire.plan.roofline import BOUND, Roofline, Terms
from quire.plan.search import Wish, replica_of
from quire.scheduler.cost_model import Work

BATCHES = (1, 4, 16, 32, 64, 128, 256, 512)
LOADS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of the saturation rate."""


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    value: float
    unit: str
    """"bytes", "tokens", "s", "$/M", ..."""
    formula: str
    """With its values."""

    @property
    def shown(self) -> str:
        if self.unit == "bytes":
            return format_bytes(int(self.value))
        if self.unit == "s":
            return f"{self.value * 1e3:,.1f} ms"
        if self.unit.startswith("$"):
            return f"{self.value:,.3f} {self.unit}"
        digits = 0 if self.value >= 1000 or self.value == int(self.value) else 2
        return f"{self.value:,.{digits}f} {self.unit}"


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoding, with no prompt in the step."""

    rows: int
    bound_tokens_per_s: float
    likely_tokens_per_s: float
    """Estimated, or predicted: `Report.kind`."""
    bound_itl_s: float
    likely_itl_s: float
    limit: str
    """What the bound waits for."""
    formula: str
    """Of the bound."""


@dataclass(frozen=True)
class Report:
    """Of a layout. All but `misfit` is only for one that fits."""

    sized: Sized
    wish: Wish
    replicas: int = 1
    cost_model: FittedCost | None = None
    """Measured in this layout: then it takes the place of the estimate."""

    @property
    def kind(self) -> str:
        return "estimate" if self.cost_model is None else "prediction"

    @cached_property
    def misfit(self) -> MemoryFitError | None:
        try:
            self.sized.sequences(1)
        except MemoryFitError as error:
            return error
        return None

    @cached_property
    def replica(self) -> Replica:
        found = replica_of(self.sized, self.wish.lengths)
        if (fitted := self.cost_model) is None:
            return found
        time: StepTime = fitted  # type: ignore[assignment]  # its is_bound is of the class
        return dataclasses.replace(found, time=time, overhead=fitted.request_seconds)

    @cached_property
    def bound(self) -> Replica:
        return replica_of(self.sized, self.wish.lengths, BOUND)

    @property
    def gpu(self) -> Gpu:
        return self.sized.layout.gpu

    @property
    def gpus(self) -> int:
        return self.replicas * self.sized.layout.tensor_parallel

    @cached_property
    def rate(self) -> float:
        """Of one replica: the one that is asked for, or half of the saturation rate."""
        asked = self.wish.rate
        return self.replica.saturation / 2 if asked is None else asked / self.replicas

    def memory(self) -> list[Figure]:
        """Of each GPU."""
        sized, gpu = self.sized, self.gpu
        config, resolved, rank = sized.prepared.config, sized.prepared.resolved, sized.rank
        part = sized.parts[0].model
        heads, size = part.heads, element_bytes(resolved.kv_cache_dtype)
        share = config.cache.gpu_memory_utilization or 0.9
        block, length = config.cache.block_size, resolved.max_model_len
        kinds = " + ".join(f"{kind} {format_bytes(n)}" for kind, n in sized.kinds.items() if n)
        total, budget = rank.memory.total, sized.kv_budget
        layers, total_tokens = len(part.own_layers), self.wish.lengths.total
        others = format_bytes(rank.weight_bytes + rank.step_bytes)
        full, asked = sized.sequences(length), sized.sequences(total_tokens)
        blocks = budget // sized.block_bytes - 1
        return [
            Figure("memory", total, "bytes", f"{total >> 20:,} MiB of {gpu.title}, by its driver"),
            Figure("weights", rank.weight_bytes, "bytes", kinds),
            Figure(
                "activations (largest step)", rank.step_bytes, "bytes",
                f"{config.scheduler.max_num_batched_tokens:,} tokens x a layer's widest tensors + "
                f"3 x 4 bytes x {config.max_samples} x {part.vocab_size:,} logits",
            ),
            Figure(
                "left for KV", budget, "bytes",
                f"min({share:g} x {format_bytes(total)}, {format_bytes(total)} - 512 MiB) - {others}",
            ),
            Figure(
                "KV of one token", sized.kv_token_bytes, "bytes",
                f"2 x {layers} layers x {heads.num_kv_heads} KV heads x {heads.head_dim} x {size} bytes"
                + (", in layers with a window for its tokens only" if any(part.windows) else ""),
            ),
            Figure(
                "KV blocks", blocks, f"of {block} tokens",
                f"{format_bytes(budget)} / {format_bytes(sized.block_bytes)} - 1",
            ),
            Figure(
                f"sequences of {length:,}", full, "at once",
                f"{blocks:,} blocks / {sized.blocks_for(length):,} of each",
            ),
            Figure(
                f"requests of {self.wish.lengths.prompt:,} + {self.wish.lengths.output:,}", asked, "at once",
                f"{blocks:,} blocks / {sized.blocks_for(total_tokens):,} of each; "
                f"--max-num-seqs allows {config.scheduler.max_num_seqs}",
            ),
        ]  # fmt: skip

    def batches(self) -> list[Batch]:
        """Of growing numbers of rows at the mean context, as far as they fit."""
        context = self.wish.lengths.context
        fits = max(1, self.sized.sequences(int(context) + 1))
        found = []
        for count in sorted({*(count for count in BATCHES if count <= fits), self.replica.seats}):
            work = Work(count, count * context)
            bound = self._roofline.terms(work)
            likely = self.replica.time.seconds(work)
            found.append(
                Batch(
                    rows=count,
                    bound_tokens_per_s=count / bound.seconds,
                    likely_tokens_per_s=count / likely,
                    bound_itl_s=bound.seconds,
                    likely_itl_s=likely,
                    limit=bound.limit,
                    formula=self._formula(bound, work),
                )
            )
        return found

    @property
    def _roofline(self) -> Roofline:
        return self.sized.time(BOUND)

    def _formula(self, terms: Terms, work: Work) -> str:
        """Of a step's bound."""
        gpu, links, peak = self.gpu, "", self._roofline.peak
        if terms.link_bytes:
            links = f", {terms.link_bytes / 1e6:,.1f} MB / {gpu.link / 1e9:g} GB/s"
        flop = terms.row_flop + terms.prompt_flop
        read = f"({terms.weight_bytes / 1e9:,.2f} GB of matrices + {terms.kv_bytes / 1e9:,.2f} GB of KV)"
        return (
            f"max({read} / {gpu.bandwidth / 1e9:,.0f} GB/s, {flop / 1e12:,.3f} TFLOP / "
            f"{peak / 1e12:,.0f} TFLOP/s{links}) = {terms.seconds * 1e3:,.2f} ms for "
            f"{work.rows + work.prompt_tokens:,.0f} tokens"
        )

    def _alone(self, kind: str, replica: Replica) -> Figure:
        time, gpu, works = replica.time, self.gpu, replica.alone()
        steps = [time.seconds(work) for work in works]
        seconds = replica.overhead + sum(steps)
        formula = (
            f"{' + '.join(f'{each * 1e3:,.1f}' for each in steps)} ms of steps + "
            f"{replica.overhead * 1e3:g} ms before"
        )
        name = f"TTFT of a prompt alone, {kind}"
        if not isinstance(time, Roofline):
            return Figure(name, seconds, "s", formula)
        reached, terms = time.efficiency, time.terms(works[0])
        formula += (
            f"; the first, of {works[0].prompt_tokens:,.0f} tokens: "
            f"{terms.prompt_flop / 1e12:,.2f} TFLOP / ({reached.prompts:g} x {time.peak / 1e12:,.0f} "
            f"TFLOP/s) or {terms.weight_bytes / 1e9:,.2f} GB / ({reached.memory:g} x "
            f"{gpu.bandwidth / 1e9:,.0f} GB/s), + {terms.host * 1e3:.2f} ms of the host"
        )
        return Figure(name, seconds, "s", formula)

    def speed(self) -> list[Figure]:
        """A prompt alone, and the saturation rate."""
        lengths = self.wish.lengths
        kinds = (("bound", self.bound), (self.kind, self.replica))
        found = [self._alone(kind, replica) for kind, replica in kinds]
        for kind, replica in kinds:
            rows = replica.most_rows
            found.append(
                Figure(
                    f"saturation rate, {kind}",
                    replica.saturation * self.replicas,
                    "requests/s",
                    f"{self.replicas} x {rows:,.1f} rows / ({lengths.output} tokens x "
                    f"{replica.mean_step(rows) * 1e3:,.2f} ms of a step with {rows:,.1f} rows and "
                    f"{rows * lengths.prompt / lengths.output:,.0f} tokens of prompts); "
                    f"limited by {self._limit(replica)}",
                )
            )
        return found

    def _limit(self, replica: Replica) -> str:
        if replica.most_rows < replica.seats:
            return "--max-num-batched-tokens"
        seats = self.sized.prepared.config.scheduler.max_num_seqs
        return "--max-num-seqs" if replica.seats == seats else "memory"

    def points(self) -> list[Point]:
        """Of one replica, at shares of its saturation rate, and at the rate that is wished."""
        rates = [share * self.replica.saturation for share in LOADS]
        rates = [rate for rate in rates if abs(rate / self.rate - 1) > 0.05] + [self.rate]
        found = (self.replica.at(rate) for rate in sorted(rates))
        return [point for point in found if point is not None]

    def cost(self, point: Point) -> list[Figure]:
        """At a rate of each replica."""
        lengths, replica = self.wish.lengths, self.replica
        hour, rate = self.gpus * self.gpu.price, point.rate * self.replicas
        bill = f"{self.gpus} x ${self.gpu.price:g} / 3600 s / {rate:,.2f} requests/s"
        request = hour / 3600 / rate
        per_prompt, per_output = replica.device_seconds(point.rows)
        prompt, output = per_prompt * lengths.prompt, per_output * lengths.output
        share = prompt / (prompt + output)
        full = self.gpus * self.gpu.price / 3600 / (replica.saturation * self.replicas)
        return [
            Figure(
                "cost per million tokens, blended", request / lengths.total * 1e6, "$/M",
                f"{bill} / {lengths.total:,} tokens x 10^6",
            ),
            Figure(
                "of input", request * share / lengths.prompt * 1e6, "$/M",
                f"{bill} x {share:.3f} (prompts' share of the device's time) / {lengths.prompt:,} x 10^6",
            ),
            Figure(
                "of output", request * (1 - share) / lengths.output * 1e6, "$/M",
                f"{bill} x {1 - share:.3f} / {lengths.output:,} x 10^6",
            ),
            Figure(
                "blended, if always saturated", full / lengths.total * 1e6, "$/M",
                f"{self.gpus} x ${self.gpu.price:g} / 3600 s / "
                f"{replica.saturation * self.replicas:,.2f} requests/s / {lengths.total:,} tokens x 10^6",
            ),
        ]  # fmt: skip
