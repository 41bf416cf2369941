"""A drafter whose guesses are a test's, and engines that use it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from quire.config import EngineConfig
from quire.executor.base import Executor
from quire.kernels.program import StepRows
from quire.messages import StepPlan
from quire.models.decoder import DecoderModel
from quire.runner.worker import Worker
from quire.speculative.base import DraftTask

Guess = Callable[[list[int], int], Sequence[int]]
"""(the request's known tokens, the most drafts wanted) -> drafts."""


class ScriptedDrafter:
    """Also checks the order of calls: it is told of every request before it is asked about it."""

    def __init__(self, guess: Guess) -> None:
        self.guess = guess
        self.seats: set[int] = set()
        self.asked = 0
        self.rows: StepRows | None = None

    def open_cache(self, rows: StepRows, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 1 and block_size > 0
        self.rows = rows
        self.seats.clear()

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        for admitted in plan.admitted:
            assert seat_of[admitted.request_id] not in self.seats
            self.seats.add(seat_of[admitted.request_id])
        assert self.seats == set(seat_of.values())

    def release(self, seat: int) -> None:
        self.seats.remove(seat)

    def propose(self, tasks: Sequence[DraftTask]) -> list[Sequence[int]]:
        assert self.rows is not None
        assert {task.seat for task in tasks} <= self.seats
        assert all(task.most > 0 for task in tasks)
        self.asked += len(tasks)
        tokens = self.rows.token_ids
        return [self.guess(tokens[t.seat, : t.num_tokens].tolist(), t.most) for t in tasks]


@contextmanager
def drafting(create: Callable[[DecoderModel], Any], most: int = 4) -> Iterator[None]:
    """Engines that are made inside draft up to `most` tokens a step with what `create` makes."""

    def executor(config: Any, spec: Any, grammars: Any) -> Executor:
        return Worker(config, spec, grammars=grammars, create_drafter=create)

    with (
        mock.patch("quire.executor.inline.inline_executor", executor),
        mock.patch.object(EngineConfig, "max_drafts", most),
    ):
        yield


class Guesses:
    """Scripted guesses of every kind, given what requests will say."""

    KINDS = (
        "right",
        "wrong",
        "mostly right",
        "random",
        "too long",
        "ends",
        "not in the vocabulary",
    )

    def __init__(self, vocab_size: int, ends: Sequence[int]) -> None:
        self.kind = "right"
        self.texts: list[list[int]] = []
        """Prompts with their outputs, if they are known."""
        self._vocab_size = vocab_size
        self._ends = ends

    def __call__(self, tokens: list[int], most: int) -> list[int]:
        chance = random.Random(repr((self.kind, tokens)))
        length = chance.randint(0, 3 * most) if self.kind == "too long" else most
        found = next((t for t in self.texts if t[: len(tokens)] == tokens), tokens)
        guess = found[len(tokens) : len(tokens) + length]
        if self.kind == "right":
            return guess
        strange = {
            "ends": list(self._ends),
            "not in the vocabulary": [-1, self._vocab_size, 2**40],
            "too long": range(self._vocab_size),
        }.get(self.kind, [])
        share = {"wrong": 1.0, "random": 1.0}.get(self.kind, 0.2)
        guess += [chance.randrange(self._vocab_size) for _ in range(length - len(guess))]
        for index in range(length):
            if chance.random() < share:
                other = chance.choice(strange) if strange else chance.randrange(self._vocab_size)
                if self.kind == "wrong":
                    other = (guess[index] + 1) % self._vocab_size
                guess[index] = other
        return guess
