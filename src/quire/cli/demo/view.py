"""Shows the conversations: all of them as they grow on a terminal, complete ones in a pipe."""

from __future__ import annotations

import asyncio
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TextIO

from quire.cli.demo.talk import Dialogue
from quire.util.terminal import printable

FRAME_SECONDS = 0.08
MAX_WIDTH = 100
QUESTION_COLUMNS = 34


class View:
    """Prints each dialogue as a block when it is complete. On a terminal, the open ones are below, one
    line each, and are redrawn as they grow; in a file or CI only complete ones are printed."""

    def __init__(self, dialogues: Sequence[Dialogue], stream: TextIO | None = None) -> None:
        self._dialogues = dialogues
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._drawn = 0
        """Number of lines in the redrawn region that are on the screen."""
        self._printed: set[int] = set()
        self._width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)

    async def run(self) -> None:
        """Draw until cancelled or all dialogues are complete; then all complete ones have been printed."""
        while not all(dialogue.finished for dialogue in self._dialogues):
            self.draw()
            await asyncio.sleep(FRAME_SECONDS)
        self.draw()

    def draw(self) -> None:
        lines: list[str] = []
        for dialogue in self._dialogues:
            if dialogue.finished and dialogue.number not in self._printed:
                self._printed.add(dialogue.number)
                lines += self._block(dialogue)
        region = self._region() if self._live else []
        up = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        self._drawn = len(region)
        if lines or region or up:
            self._stream.write(up + "".join(line + "\n" for line in [*lines, *region]))
            self._stream.flush()

    def _region(self) -> list[str]:
        """One line per open dialogue: the question, and the end of its answer so far."""
        rows = []
        for dialogue in self._dialogues:
            if dialogue.finished or not dialogue.turns:
                continue
            turn = dialogue.turns[-1]
            question = textwrap.shorten(turn.question, QUESTION_COLUMNS, placeholder="…")
            room = max(10, self._width - QUESTION_COLUMNS - 8)
            answer = " ".join(printable(turn.answer).replace("\\n", " ").split())
            tail = answer if len(answer) <= room else "…" + answer[1 - room :]
            rows.append(f"{dialogue.number:>3}  {question:<{QUESTION_COLUMNS}}  {tail}")
        if rows:
            rows.append(self._status())
        return rows

    def _status(self) -> str:
        turns = [turn for dialogue in self._dialogues for turn in dialogue.turns]
        open_turns = [turn for turn in turns if not turn.done]
        characters = sum(len(turn.answer) for turn in turns)
        seconds = time.monotonic() - min(turn.sent for turn in turns)
        return f"     {len(open_turns)} streaming · {characters} characters · {seconds:.1f} s"

    def _block(self, dialogue: Dialogue) -> list[str]:
        title = f"── conversation {dialogue.number} "
        lines = [title + "─" * (self._width - len(title))]
        for turn in dialogue.turns:
            lines += self._said("you  ", turn.question)
            lines += self._said("quire", turn.answer.strip() or "(nothing)")
        return lines

    def _said(self, who: str, text: str) -> list[str]:
        """A paragraph with its speaker in the margin; line breaks of the text are kept."""
        rows: list[str] = []
        for line in printable(text, keep_newlines=True).split("\n"):
            rows += textwrap.wrap(
                line, self._width - 7, drop_whitespace=True, replace_whitespace=False
            ) or [""]
        return [f"{who if position == 0 else '     '}  {row}" for position, row in enumerate(rows)]
