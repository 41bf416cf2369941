"""How long a step takes: the one question that the simulator and the planner ask of a device."""

from __future__ import annotations

from typing import Protocol

from quire.scheduler.cost_model import Work


class StepTime(Protocol):
    """A fitted model of a measured device, or a bound from a device's data sheet."""

    is_bound: bool
    """Whether it is the least time that a device could need, not a prediction."""

    def seconds(self, work: Work) -> float:
        """Of a whole step, with what the host does between steps."""
        ...
