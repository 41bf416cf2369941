"""Fills the schedule of `quire.bench.agents` with words: as chat messages, as one text, or as token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quire.bench.agents import Piece, Session
from quire.bench.datasets.prompts import PromptMaker

if TYPE_CHECKING:
    from quire.text import Tokenizer

ROLES = {"system": "system", "tool": "user", "answer": "assistant"}
"""Tool results are sent as the user's messages: not every chat template has the role `tool`."""


class AgentContents:
    """The same contents for the same seed and the same piece.

    In texts, the server's own answers become the history. In token ids they cannot, because most servers
    send text only and text does not encode to the ids it came from. There, random ids of the asked length
    stand for each answer, so that all servers get exactly the same requests.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._maker = PromptMaker(tokenizer, seed)
        self._system: dict[int, str] = {}

    def token_ids(self, session: Session, turn: int) -> list[int]:
        return [token for piece in session.prompt(turn) for token in self._draw(piece)]

    def messages(self, session: Session, turn: int, answers: Sequence[str]) -> list[dict[str, str]]:
        """Chat messages. answers: the texts of all turns before `turn`."""
        spoken = iter(answers)
        return [
            {
                "role": ROLES[piece.role],
                "content": next(spoken) if piece.role == "answer" else self._text(piece),
            }
            for piece in session.prompt(turn)
        ]

    def text(self, session: Session, turn: int, answers: Sequence[str]) -> str:
        return "".join(message["content"] for message in self.messages(session, turn, answers))

    def _draw(self, piece: Piece) -> list[int]:
        return self._maker.draw(piece.num_tokens, rng=random.Random(f"{self._seed}:{piece.name}"))

    def _text(self, piece: Piece) -> str:
        if piece.role != "system":
            return self._maker.text(self._draw(piece))
        if piece.num_tokens not in self._system:
            self._system[piece.num_tokens] = self._system_text(piece)
        return self._system[piece.num_tokens]

    def _system_text(self, piece: Piece) -> str:
        """Schemas of tools, as many as fit, then words up to the length."""
        words = self._draw(piece)
        text = ""
        while True:
            longer = f"{text}{self._schema(random.Random(f'{self._seed}:{text}'))}\n"
            if self._count(longer) > piece.num_tokens:
                break
            text = longer
        return text + self._maker.text(words[: piece.num_tokens - self._count(text)])

    def _schema(self, rng: random.Random) -> str:
        name, about, first, second = (
            self._maker.text(self._maker.draw(count, rng=rng)).strip() for count in (1, 12, 1, 1)
        )
        fields = {first: {"type": "string"}, second: {"type": "integer"}}
        parameters = {"type": "object", "properties": fields, "required": [first]}
        function = {"name": name, "description": about, "parameters": parameters}
        return json.dumps({"type": "function", "function": function})

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))
