"""The metrics of several engine cores: the same families, with vLLM's label `engine` for each core."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Gauge

from quire.metrics.engine_metrics import EngineMetrics
from quire.metrics.request_stats import FinishedRequest, MetricsSink

if TYPE_CHECKING:
    from quire.messages import StepOutputs


def create_metrics(
    registry: CollectorRegistry,
    cache_infos: Sequence[Mapping[str, object] | None],
    *,
    states: Callable[[], Sequence[str]] | None = None,
    **options: Any,
) -> MetricsSink:
    """cache_infos: of each core. states: of each core, "ok" if it serves. options: as `EngineMetrics`."""
    each: list[EngineMetrics] = []
    for index, info in enumerate(cache_infos):
        families = each[0] if each else None
        each.append(
            EngineMetrics(
                registry, engine=str(index), cache_info=info, families=families, **options
            )
        )
    if len(each) == 1:
        return each[0]
    if states is not None:
        labels = ["model_name", "engine"]
        up = Gauge("quire:replica_up", "Whether it serves.", labels, registry=registry)
        for index in range(len(each)):
            one = up.labels(options["model_name"], str(index))
            one.set_function(partial(_is_up, states, index))
    return ReplicaMetrics(each)


def _is_up(states: Callable[[], Sequence[str]], index: int) -> float:
    return float(states()[index] == "ok")


class ReplicaMetrics:
    """A `MetricsSink` that reports each event to the metrics of its core."""

    def __init__(self, each: Sequence[MetricsSink]) -> None:
        self._each = each
        self._current = each[0]

    def on_step(self, outputs: StepOutputs) -> None:
        """What is reported until the next step is of this one."""
        self._current = self._each[outputs.replica]
        self._current.on_step(outputs)

    def on_first_token(
        self,
        ttft_seconds: float | None,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        external_tokens: int = 0,
    ) -> None:
        self._current.on_first_token(
            ttft_seconds,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            external_tokens=external_tokens,
        )

    def on_token_gap(self, seconds: float) -> None:
        self._current.on_token_gap(seconds)

    def on_finished(self, request: FinishedRequest) -> None:
        self._each[request.replica].on_finished(request)

    def on_rejected(self, reason: str) -> None:
        """Before it had a core."""
        self._each[0].on_rejected(reason)

    def on_sleep_state(self, level: int) -> None:
        for metrics in self._each:
            metrics.on_sleep_state(level)
