"""What waits, how long it will, and the time of a step: for autoscaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.metrics.family import Family

if TYPE_CHECKING:
    from quire.messages import LoadStats


class LoadMetrics:
    def __init__(self, make: Family) -> None:
        self._queue_tokens = make.gauge(
            "quire:queue_tokens",
            "Prompt tokens of waiting requests, without those that the cache is expected to hold.",
        )
        self._wait = make.gauge(
            "quire:estimated_wait_seconds",
            "Predicted seconds until a request that comes now starts; 0 while nothing was measured.",
        )
        self._predicted = make.gauge(
            "quire:step_predicted_seconds", "What the last measured step was expected to take."
        )
        self._target = make.gauge(
            "quire:step_target_seconds", "--itl-target, of a step; 0 without it."
        )
        self._shown: LoadStats | None = None

    def on_load(self, load: LoadStats) -> None:
        if load == self._shown:  # as in most steps
            return
        self._shown = load
        self._queue_tokens.set(load.queue_tokens)
        self._wait.set(load.wait_seconds)
        self._predicted.set(load.step_predicted)
        self._target.set(load.step_target)
