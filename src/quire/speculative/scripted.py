"""A drafter for tests: its drafts come from a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quire.kernels.program import StepRows
from quire.messages import StepPlan
from quire.speculative.base import DraftContext, DraftTask

Script = Callable[[list[int], int], Sequence[int]]
"""From a request's known tokens, and the most drafts wanted, to drafts."""


class Scripted:
    def __init__(self, script: Script = lambda token_ids, most: ()) -> None:
        """Without a script there are no drafts."""
        self.script = script

    def open_cache(self, rows: StepRows, num_blocks: int, block_size: int) -> None:
        self._rows = rows

    def begin(self, plan: StepPlan, seat_of: Mapping[int, int]) -> None:
        pass

    def release(self, seat: int) -> None:
        pass

    def propose(self, tasks: Sequence[DraftTask]) -> list[Sequence[int]]:
        known = (self._rows.token_ids[task.seat, : task.num_tokens].tolist() for task in tasks)
        return [
            self.script(ids, task.most)[: task.most] for ids, task in zip(known, tasks, strict=True)
        ]


def create(context: DraftContext) -> Scripted:
    return Scripted()
