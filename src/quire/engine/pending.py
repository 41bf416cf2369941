"""Requests on their way to the scheduler: each waits until its grammar is compiled and its adapter is in
memory, while steps run.

They are in the policy's order. One whose adapter finds no room, because requests in the scheduler use all
adapters in memory, is passed by those behind it whose adapter is there; but only for `PATIENCE` passes. Then
none of them passes until it is in memory.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from quire.engine.residence import AdapterMemory, Residence, name_of
from quire.messages import (
    AddRequest,
    Answer,
    Control,
    FinishReason,
    LoadAdapter,
    RequestUpdate,
    SchedulerStats,
)
from quire.messages.failures import failure_of
from quire.messages.state import RequestState
from quire.scheduler import WaitReason
from quire.scheduler.adapters import PATIENCE
from quire.scheduler.state import preparing
from quire.structured.base import Grammar, GrammarError
from quire.structured.store import GrammarStore

WAIT_SECONDS = 0.005


@dataclass(slots=True)
class _Entry:
    order: tuple[float, ...]
    message: AddRequest | Control
    adapter: str | None
    blocked_since: int | None = None
    """The first pass in which its adapter found no room."""


class PendingRequests:
    """Used by one thread, the engine core's."""

    def __init__(
        self,
        grammars: GrammarStore | None,
        adapters: AdapterMemory,
        order: Callable[[AddRequest], tuple[float, ...]],
    ) -> None:
        self.adapters = adapters
        self._grammars = grammars
        self._order = order
        self._entries: list[_Entry] = []
        self._answers: list[Answer] = []
        """To calls, for the next report."""
        self._pass = 0

    def __len__(self) -> int:
        """The number of requests; calls do not count."""
        return sum(isinstance(entry.message, AddRequest) for entry in self._entries)

    @property
    def has_work(self) -> bool:
        return bool(self._entries) or self.adapters.is_loading

    def add(self, message: AddRequest) -> WaitReason | None:
        """Take a request that needs a grammar or an adapter. Returns why it waits; None if it needs neither
        and was not taken. Raises if it cannot be accepted."""
        grammar, adapter = message.decoding.grammar, message.placement.adapter
        if grammar is None and adapter is None:
            return None
        if grammar is not None:
            if self._grammars is None:
                raise ValueError("this engine has no grammars")
            self._grammars.prepare(grammar)
        self.adapters.accept(message)
        entry = _Entry(self._order(message), message, adapter)
        insort(self._entries, entry, key=lambda entry: entry.order)
        return WaitReason.ADAPTER if grammar is None else WaitReason.GRAMMAR

    def load(self, control: Control, action: LoadAdapter) -> None:
        """A call to load an adapter, behind the requests that have come. Raises `CheckpointError`."""
        self.adapters.check(action.key)
        last = self._entries[-1].order if self._entries else ()
        self._entries.append(_Entry(last, control, action.key))

    def take(self, *, wait: bool) -> tuple[list[AddRequest], list[RequestUpdate]]:
        """The requests that are ready, and the ends of those that have failed. wait: there is no other work,
        so wait a short time for news."""
        if wait and self.adapters.is_loading:
            self.adapters.wait(WAIT_SECONDS)
        elif wait and self._grammars is not None:
            self._grammars.wait(WAIT_SECONDS)
        self.adapters.collect()
        self._pass += 1
        overdue = False
        ready, ends, left = [], [], []
        for entry in self._entries:
            failure, message = None, entry.message
            try:
                done = self._is_ready(entry, overdue)
            except Exception as error:
                failure, done = error, True
            since = entry.blocked_since
            overdue = overdue or (since is not None and self._pass - since >= PATIENCE)
            if not done:
                left.append(entry)
            elif isinstance(message, Control):
                self._answers.append(_answer(message, failure))
            elif failure is not None:
                ends.append(failed(message, failure))
            else:
                self.adapters.pin(message)
                ready.append(message)
        self._entries = left
        return ready, ends

    def _is_ready(self, entry: _Entry, overdue: bool) -> bool:
        """overdue: one before it has waited for long. Raises the error of its grammar or its adapter."""
        message = entry.message
        if isinstance(message, AddRequest) and message.decoding.grammar is not None:
            assert self._grammars is not None
            grammar: Grammar | GrammarError | None = self._grammars.ready(message.decoding.grammar)
            if isinstance(grammar, GrammarError):
                raise grammar
            if grammar is None:
                return False
        if entry.adapter is None:
            return True
        found = self.adapters.find(entry.adapter)
        if found is Residence.NO_ROOM and entry.blocked_since is None:
            entry.blocked_since = self._pass
        return found is Residence.LOADED and not overdue

    def abort(
        self, request_ids: Iterable[int], reason: FinishReason = FinishReason.ABORT
    ) -> list[RequestUpdate]:
        """End those of the requests that wait here."""
        ids = set(request_ids)
        gone = {
            entry.message.request_id: entry.message
            for entry in self._entries
            if isinstance(entry.message, AddRequest) and entry.message.request_id in ids
        }
        if gone:
            self._entries = [
                e for e in self._entries if getattr(e.message, "request_id", None) not in gone
            ]
        return [ended(message, reason) for _, message in sorted(gone.items())]

    def states(self, now: float) -> list[RequestState]:
        """Of the requests that wait here."""
        found = []
        for message in (entry.message for entry in self._entries):
            if isinstance(message, AddRequest):
                grammar = message.decoding.grammar
                reason = WaitReason.ADAPTER if grammar is None else WaitReason.GRAMMAR
                found.append(preparing(message, reason, now))
        return found

    def report(self, stats: SchedulerStats, running: Mapping[str, int]) -> list[Answer]:
        """Add what waits here to `stats`, and return the answers to calls. running: the number of running
        requests by adapter."""
        stats.num_waiting += len(self)
        stats.waiting_by_reason[WaitReason.ADAPTER.label] += len(self)
        stats.running_adapters = sorted({name_of(key) for key in running})
        stats.waiting_adapters = self.adapters.waiting_names(running)
        answers, self._answers = self._answers, []
        return answers


def _answer(control: Control, error: Exception | None) -> Answer:
    what = "The adapter could not be loaded"
    return Answer(control.id, 0, None if error is None else failure_of(error, what))


def ended(message: AddRequest, reason: FinishReason) -> RequestUpdate:
    """The end of a request that waits for a core's scheduler. One that has tokens of another core has not
    only waited."""
    if reason is FinishReason.EXPIRED and message.output_token_ids:
        reason = FinishReason.TIMEOUT
    return RequestUpdate(request_id=message.request_id, finish_reason=reason)


def failed(message: AddRequest, error: Exception) -> RequestUpdate:
    """The end of a request that cannot be served."""
    return RequestUpdate(
        request_id=message.request_id,
        finish_reason=FinishReason.ERROR,
        error=failure_of(error, "The engine could not accept the request").message,
    )
