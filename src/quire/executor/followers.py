"""The other ranks, as the executor talks to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from quire.distributed.links import LinkError, send_all
from quire.errors import QuireError, WorkerError
from quire.executor.ranks import Rank
from quire.executor.watch import Watch
from quire.messages import StepPlan
from quire.messages.failures import error_of
from quire.messages.worker import Carried, RunStep, SampledTokens, WorkerInput, WorkerOutput
from quire.runner.following import without_sampling

T = TypeVar("T", bound=WorkerOutput)
R = TypeVar("R")

EXPLAIN_SECONDS = 1.0
"""After an error in a step: until the watch has found which rank caused it."""


class Followers:
    """All ranks but this process's. An error that one of them causes names it."""

    def __init__(
        self, ranks: Sequence[Rank], *, timeout: float, on_failure: Callable[[str], None]
    ) -> None:
        """timeout: seconds that one may be late after this rank has done its own part."""
        self.ranks = ranks
        self.watch = Watch(ranks, on_failure)
        self._timeout = timeout
        self._encode = msgspec.msgpack.Encoder().encode

    def run(self, plan: StepPlan, sampled: list[SampledTokens]) -> None:
        self.watch.check()
        self.send(RunStep(without_sampling(plan), sampled))

    def send(self, message: WorkerInput, ranks: Sequence[Rank] | None = None) -> None:
        """Encoded once. ranks: if not to all."""
        to = self.ranks if ranks is None else ranks
        try:
            send_all([rank.link for rank in to], self._encode(message))
        except LinkError as error:
            raise self.explained(error) from None

    def answers(self, kind: type[T]) -> dict[int, T]:
        return {rank.number: self.watch.answer(rank, kind, self._timeout) for rank in self.ranks}

    def beside(self, own: Callable[[], R]) -> R:
        """This rank's part of what all do."""
        try:
            return own()
        except WorkerError as error:
            raise self.explained(error) from None

    def call(
        self, number: int, message: WorkerInput, own: Callable[[], None]
    ) -> dict[int, QuireError]:
        """Each rank carries out the message, this one `own`. The errors by rank; one that has an error is as
        it was before. number: of this rank."""
        self.send(message)
        failures: dict[int, QuireError] = {}
        try:
            self.beside(own)
        except WorkerError:
            raise
        except QuireError as error:
            failures[number] = error
        for other, carried in self.answers(Carried).items():
            if carried.failure is not None:
                failures[other] = error_of(carried.failure)
        return failures

    def explained(self, error: WorkerError) -> QuireError:
        """The watch's error if it has found one."""
        self.watch.wait(EXPLAIN_SECONDS, lambda: False)
        self.watch.fail(error)
        return self.watch.error or error
