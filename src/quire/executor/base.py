"""Anything that can carry out a `StepPlan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from quire.kvtransfer.base import Store
from quire.messages import StepPlan, StepResult
from quire.runner.footprint import Footprint


class StepFuture(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the step raised."""
        ...


class AdapterLoad(Protocol):
    """The end of loading an adapter."""

    @property
    def key(self) -> str: ...
    @property
    def error(self) -> str | None:
        """None: it is in memory. Else why it is not, for a client: names no path."""
        ...


class AdapterStore(Protocol):
    """The LoRA adapters in a worker's memory, by key (`Placement.adapter`)."""

    def load(self, key: str, path: Path) -> None:
        """Begin to load the adapter in a directory, in another thread. It may be named by plans once it has
        been polled."""
        ...

    def poll(self) -> Sequence[AdapterLoad]:
        """What has ended since the last call. Does not wait."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until there is something to poll, at most so long."""
        ...

    def drop(self, key: str) -> None:
        """Free its memory, as soon as no plan in flight uses it. No later plan does."""
        ...


class Executor(Protocol):
    """Runs plans in the given order: each reads the KV and the sampled tokens of those before it, and
    writes only after they have read. The engine knows nothing else about devices."""

    @property
    def max_in_flight(self) -> int:
        """The number of plans that may be launched before the result of the first is taken. 1: each is
        finished before the next is made. 2: the next one is made and launched while one runs."""
        ...

    @property
    def adapters(self) -> AdapterStore | None:
        """None if adapters are not served, and while asleep: sleeping drops them."""
        ...

    @property
    def store(self) -> Store | None:
        """What the sampling rank keeps of KV outside the cache. None if nothing is kept, and while
        asleep."""
        ...

    @property
    def watched(self) -> int | None:
        """A descriptor that becomes readable when the executor can carry out no plan any more, though none is
        under way. None if that cannot happen."""
        ...

    def check(self) -> None:
        """Raises `WorkerError` if the executor can carry out no plan any more."""
        ...

    def load(self) -> Footprint:
        """Load the model. Before anything else.

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
        """Called when there is no work: do one piece of work that makes later steps faster, so short that
        a request can wait for it. Returns False if nothing is left."""
        ...

    def sleep(self, level: int) -> None:
        """Free memory, with no plan in flight and no request admitted: at level 1 the KV cache's, at 2
        also the weights'."""
        ...

    def wake_up(self) -> None:
        """Return to the state after the start. Raises `MemoryFitError`, and stays asleep, if memory is
        lacking."""
        ...

    def close(self) -> None:
        """Free memory and end processes, even with plans in flight. Idempotent."""
        ...


class Done:
    """The future of a finished step."""

    __slots__ = ("_result",)

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result
