"""Requests on their way to the scheduler: each waits until its grammar is compiled and its adapter is in
memory, while steps run.

They are in the policy's order. One whose adapter finds no room, because requests in the scheduler use all
adapters in memory, is passed by those behind it whose adapter is there; but only for `PATIENCE` passes. Then
none of them passes until it has got room.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from quire.engine.failures import failure_of
from quire.engine.residence import AdapterMemory, Residence
from quire.messages import AddRequest, Control, FinishReason, LoadAdapter, RequestUpdate
from quire.scheduler import WaitReason
from quire.scheduler.adapters import PATIENCE
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


@dataclass(slots=True)
class Arrivals:
    """What `take` found."""

    ready: list[AddRequest]
    failed: list[RequestUpdate]
    loaded: list[tuple[Control, Exception | None]]
    """Calls that have been carried out."""


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

    def take(self, *, wait: bool) -> Arrivals:
        """The requests that are ready, and those that have failed. wait: there is no other work, so wait a
        short time for news."""
        arrivals = Arrivals([], [], [])
        if wait:
            if self.adapters.is_loading:
                self.adapters.wait(WAIT_SECONDS)
            elif self._grammars is not None:
                self._grammars.wait(WAIT_SECONDS)
        self.adapters.collect()
        self._pass += 1
        overdue = False
        left = []
        for entry in self._entries:
            try:
                done = self._is_ready(entry, overdue)
            except Exception as error:
                self._fail(entry, error, arrivals)
                continue
            since = entry.blocked_since
            overdue = overdue or (since is not None and self._pass - since >= PATIENCE)
            if not done:
                left.append(entry)
            elif isinstance(entry.message, AddRequest):
                self.adapters.pin(entry.message)
                arrivals.ready.append(entry.message)
            else:
                arrivals.loaded.append((entry.message, None))
        self._entries = left
        return arrivals

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
        if found is not Residence.NO_ROOM:
            entry.blocked_since = None
            return found is Residence.LOADED and not overdue
        if entry.blocked_since is None:
            entry.blocked_since = self._pass
        return False

    def _fail(self, entry: _Entry, error: Exception, arrivals: Arrivals) -> None:
        if isinstance(entry.message, Control):
            arrivals.loaded.append((entry.message, error))
        else:
            arrivals.failed.append(failed(entry.message, error))

    def abort(self, request_ids: Iterable[int]) -> list[RequestUpdate]:
        """End those of the requests that wait here."""
        ids = set(request_ids)
        gone = {
            entry.message.request_id
            for entry in self._entries
            if isinstance(entry.message, AddRequest) and entry.message.request_id in ids
        }
        if gone:
            self._entries = [
                e for e in self._entries if getattr(e.message, "request_id", None) not in gone
            ]
        return [RequestUpdate(request_id=i, finish_reason=FinishReason.ABORT) for i in sorted(gone)]


def failed(message: AddRequest, error: Exception) -> RequestUpdate:
    """The end of a request that cannot be served."""
    return RequestUpdate(
        request_id=message.request_id,
        finish_reason=FinishReason.ERROR,
        error=failure_of(error, "The engine could not accept the request").message,
    )
