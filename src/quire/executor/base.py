"""Anything that can carry out a `StepPlan`."""

from __future__ import annotations

from typing import Protocol

from quire.messages import StepPlan, StepResult
from quire.runner.footprint import Footprint


class StepFuture(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs plans in the order given: each finds the KV that those before it wrote and the tokens they
    sampled, and writes nothing before they have read. The engine knows nothing else about devices."""

    @property
    def max_in_flight(self) -> int:
        """Plans it wants at once, launched and their results not taken. 1: each is done before the next is
        made. 2: the next one is made, and launched, while one runs."""
        ...

    def load(self) -> Footprint:
        """Load the model; of several devices the tightest footprint. Before anything else.

        Raises `ModelError`, `ConfigError` or `MemoryFitError`.
        """
        ...

    def open_cache(self, num_blocks: int, max_model_len: int) -> None:
        """Make the KV cache, of so many blocks with the null block; no request is longer than
        max_model_len. Before the first plan. Raises `MemoryFitError`."""
        ...

    def execute(self, plan: StepPlan) -> StepFuture:
        """Launch a plan. Without rows it has no tokens, but may have requests to forget."""
        ...

    def prepare(self) -> bool:
        """Called when there is no work: do one short piece of what makes later steps faster, as long as a
        request may be made to wait. False if nothing is left."""
        ...

    def sleep(self, level: int) -> None:
        """Give back memory, with nothing in flight and nobody admitted: at level 1 the KV cache's, at 2 the
        weights' too."""
        ...

    def wake_up(self) -> None:
        """Be as after the start again. Raises `MemoryFitError`, and sleeps on, if the memory is gone."""
        ...

    def close(self) -> None:
        """Give back memory and processes, whatever is in flight. Idempotent."""
        ...


class Done:
    """A step that is finished already."""

    __slots__ = ("_result",)

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result
