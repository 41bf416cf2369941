"""W6, agents: sessions of many turns over a shared system prompt, as a schedule of lengths.

A session is a loop: the agent sends its history with a new tool result, reads the answer, thinks, and sends
again. Its prompt is a list of `Piece`s: the system prompt that all sessions share, then a tool result and
an answer for each turn so far. Some turns first replace an earlier tool result by another one of the same
length, as agents do that shorten or correct their history: from there on nothing of the prompt is cached.

The schedule says how long each piece is and which pieces two prompts have in common, not what is in them.
`quire bench serve` fills it with text or token ids, `bench.peers` with token ids. Only the standard library.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class AgentShape:
    """The size of the workload. Lengths are in tokens, ranges include both ends."""

    sessions: int = 8
    turns: int = 12
    system_len: int = 1500
    tool_len: tuple[int, int] = (100, 600)
    output_len: tuple[int, int] = (20, 120)
    think_time: float = 1.0
    """Seconds between the end of an answer and the next turn."""
    edit_share: float = 0.25
    """Of the turns after a session's first, how many replace an earlier tool result."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt. Two pieces have the same content if they have the same name."""

    role: Literal["system", "tool", "answer"]
    name: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    tool_len: int
    output_len: int
    edits: int | None
    """The earlier turn whose tool result is replaced before this one."""


@dataclass(frozen=True, slots=True)
class Session:
    """One agent. `start`: seconds from the start of the run to its first turn."""

    number: int
    system_len: int
    start: float
    turns: tuple[Turn, ...]

    def prompt(self, turn: int) -> list[Piece]:
        """The pieces of the prompt of turn `turn`, from 0."""
        pieces = [Piece("system", "system", self.system_len)]
        for earlier in range(turn + 1):
            known = self.turns[earlier]
            if earlier:
                before = self.turns[earlier - 1]
                name = f"session {self.number} answer {earlier - 1}"
                pieces.append(Piece("answer", name, before.output_len))
            edits = [at for at in range(turn + 1) if self.turns[at].edits == earlier]
            name = f"session {self.number} tool {earlier} of turn {max(edits, default=earlier)}"
            pieces.append(Piece("tool", name, known.tool_len))
        return pieces

    def prompt_len(self, turn: int) -> int:
        return sum(piece.num_tokens for piece in self.prompt(turn))

    def shared_len(self, turn: int) -> int:
        """Tokens at the start of turn `turn`'s prompt that the prompt before it has too: what a prefix
        cache can save at most, if it does not have the answer between them. 0 for the first turn."""
        shared = 0
        for ours, theirs in zip(
            self.prompt(turn), self.prompt(turn - 1) if turn else (), strict=False
        ):
            if ours.name != theirs.name:
                break
            shared += ours.num_tokens
        return shared


def schedule(shape: AgentShape, seed: int) -> list[Session]:
    """The sessions of one run: the same for the same shape and seed. They start within one think time."""
    rng = random.Random(seed)
    sessions = []
    for number in range(shape.sessions):
        edited = set(rng.sample(range(1, shape.turns), round(shape.edit_share * (shape.turns - 1))))
        turns = tuple(
            Turn(
                rng.randint(*shape.tool_len),
                rng.randint(*shape.output_len),
                rng.randrange(turn) if turn in edited else None,
            )
            for turn in range(shape.turns)
        )
        start = rng.uniform(0.0, shape.think_time)
        sessions.append(Session(number, shape.system_len, start, turns))
    return sessions


def interactivity(turns: Sequence[tuple[float, int]]) -> float:
    """Tokens per second that nine turns in ten reach from end to end: 1 / P90(latency / output tokens),
    interpolated linearly.

    turns: seconds from when the turn was due to its last token, and its output tokens. 0.0 without a turn.
    """
    costs = [seconds / max(tokens, 1) for seconds, tokens in turns]
    if len(costs) < 2:
        return 1.0 / costs[0] if costs else 0.0
    return 1.0 / statistics.quantiles(costs, n=10, method="inclusive")[-1]
