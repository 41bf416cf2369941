"""Requests that outlive their engine core, without I/O.

When a core dies, its requests go to another one, or to the same one when it has been started again, with
what they have generated so far; there they go on as after a preemption, so the same tokens follow. But one
of them may be why the core died. A *suspect* was in a core that died, and has not proved harmless since, by
`PROOF` steps with news of it (its prompt, and decoding, with a token of its own) or by its end. After a
death whose cause is not known to be outside, suspects run *on trial*: the first goes to a core, the next
follows when that one has proved harmless, and requests that were in no death wait until all suspects are
through. So at most one suspect is in a core, beside requests that have just proved harmless.
If a core dies again, it was that one: the second death finds it. What a request computes next depends on its
tokens alone, so a request that kills the core does so again at the same place.

SIGKILL without lack of memory, and a process that was stopped, come from outside and say little: after such
a death all requests go on at once. A request is found only if it was alone in two such deaths, or on trial
after two, in a third.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from quire.errors import PoisonRequestError
from quire.messages import AddRequest, FinishReason, RequestUpdate

PROOF = 3
"""Steps with news of a request in a core, after which it is no longer a suspect."""
MAX_REFUSED = 4096
"""Requests that are refused at a time; the latest ones."""
ENOUGH_DEATHS = 3
"""Deaths that prove something whatever their cause."""


@dataclass(frozen=True, slots=True)
class Death:
    """Why a core is no more."""

    reason: str
    from_outside: bool = False
    """Somebody has ended or stopped the process: its requests are not the likely cause."""


@dataclass(slots=True)
class _Entry:
    """A request that has not ended."""

    message: AddRequest
    output: list[int]
    num_prompt_logprobs: int
    was_sent: bool = False
    news: int = 0
    """Steps with news of it, in the core that it is in."""
    deaths: int = 0
    """Of cores that it was in, since it last proved harmless."""
    deaths_alone: int = 0
    """Those of them in which it was the only one."""


@dataclass(slots=True)
class Verdict:
    """What follows from a death."""

    ended: list[RequestUpdate] = field(default_factory=list)
    """The requests that are blamed, and those like it."""
    num_resumed: int = 0
    explains: int = 0
    """How many deaths, with this one, the blamed request explains; 0 if none is blamed."""


class Recovery:
    """The live requests behind a front end, and which of them may go to a core now."""

    def __init__(
        self, *, refusal_seconds: float = 600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._refusal_seconds = refusal_seconds
        self._clock = clock
        self._entries: dict[int, _Entry] = {}
        self._suspects: deque[int] = deque()
        """To be sent, one at a time."""
        self._others: deque[int] = deque()
        """To be sent."""
        self._on_trial: int | None = None
        self._ends: list[RequestUpdate] = []
        self._refused: dict[bytes, float] = {}
        """Fingerprint -> until when."""

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._entries

    @property
    def has_waiting(self) -> bool:
        return bool(self._suspects or self._others)

    @property
    def num_held(self) -> int:
        """Requests that are in no core."""
        return sum(i in self._entries for i in (*self._suspects, *self._others))

    def uses_adapter(self, key: str) -> bool:
        return any(entry.message.placement.adapter == key for entry in self._entries.values())

    # --- from the front end -----------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """A new request."""
        if self.refuses(message):
            self._ends.append(_blamed(message.request_id))
        else:
            self._entries[message.request_id] = _Entry(message, [], message.num_prompt_logprobs)
            self._others.append(message.request_id)

    def refuses(self, message: AddRequest) -> bool:
        """Whether a core has died of its like lately."""
        if not self._refused:
            return False
        now = self._clock()
        self._refused = {each: until for each, until in self._refused.items() if until > now}
        return bool(self._refused) and fingerprint(message) in self._refused

    def abort(self, request_ids: Iterable[int]) -> None:
        """They have ended for the front end, which expects no more of them."""
        for request_id in request_ids:
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        if self._entries.pop(request_id, None) is not None and request_id == self._on_trial:
            self._on_trial = None

    # --- to and from the cores --------------------------------------------------------------------

    def sendable(self) -> Iterator[AddRequest]:
        """The requests that may go to a core now. Stop when there is none that takes them."""
        while self._on_trial is None and (self._suspects or self._others):
            is_suspect = bool(self._suspects)
            queue = self._suspects if is_suspect else self._others
            entry = self._entries.get(queue.popleft())
            if entry is None:
                continue
            if is_suspect:
                self._on_trial = entry.message.request_id
            message = _resumed(entry) if entry.was_sent else entry.message
            entry.was_sent, entry.news = True, 0
            yield message

    def take(self, update: RequestUpdate) -> None:
        """News of a request, on its way to the front end."""
        entry = self._entries.get(update.request_id)
        if entry is None:
            return
        if update.finish_reason is not None:
            self._forget(update.request_id)
            return
        entry.output += update.new_token_ids
        if update.prompt_logprobs is not None:
            news = update.prompt_logprobs
            entry.num_prompt_logprobs = news.start + len(news.entries)
        entry.news += 1
        if entry.news == PROOF:
            entry.deaths = entry.deaths_alone = 0
            if update.request_id == self._on_trial:
                self._on_trial = None

    def take_ends(self) -> list[RequestUpdate]:
        """The ends of requests that were refused, and of those in no core that are past their deadlines."""
        ends, self._ends = self._ends, []
        if not (self._suspects or self._others):
            return ends
        now = self._clock()
        for request_id in [*self._suspects, *self._others]:
            entry = self._entries.get(request_id)
            if entry is None or entry.message.deadline is None or entry.message.deadline > now:
                continue
            reason = FinishReason.TIMEOUT if entry.output else FinishReason.EXPIRED
            ends.append(RequestUpdate(request_id=request_id, finish_reason=reason))
            self._forget(request_id)
        return ends

    def died(self, request_ids: Collection[int], death: Death) -> Verdict:
        """A core has died with these requests."""
        inside = [i for i in request_ids if i in self._entries]
        for request_id in inside:
            self._entries[request_id].deaths += 1
            self._entries[request_id].deaths_alone += len(inside) == 1
        if self._on_trial in inside:
            self._on_trial = None
        again = [i for i in inside if self._entries[i].deaths > 1]
        if len(again) == 1 and self._is_proof(self._entries[again[0]], death):
            return self._blame(again[0], inside)
        resumed = sorted(inside, key=self._order)
        if not death.from_outside or again:
            first = [i for i in resumed if i not in again]  # the more deaths, the later
            self._suspects.extend([*first, *again])
        else:
            self._others.extendleft(reversed(resumed))
        return Verdict(num_resumed=len(resumed))

    def _is_proof(self, suspect: _Entry, death: Death) -> bool:
        """suspect: the only one that was in two deaths."""
        if death.from_outside:
            return suspect.deaths_alone > 1 or suspect.deaths >= ENOUGH_DEATHS
        return True

    def _blame(self, culprit: int, inside: list[int]) -> Verdict:
        """End it and its like, and refuse them; the others are free of suspicion."""
        mark = fingerprint(self._entries[culprit].message)
        self._refused.pop(mark, None)
        self._refused[mark] = self._clock() + self._refusal_seconds
        if len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]
        explains = self._entries[culprit].deaths
        like = [i for i, e in self._entries.items() if fingerprint(e.message) == mark]
        for request_id in like:
            self._forget(request_id)
        resumed = [i for i in inside if i in self._entries]
        free = [*resumed, *(i for i in self._suspects if i in self._entries)]
        self._suspects.clear()
        for request_id in free:
            self._entries[request_id].deaths = self._entries[request_id].deaths_alone = 0
        self._others.extendleft(sorted(free, key=self._order, reverse=True))
        return Verdict([_blamed(i) for i in like], len(resumed), explains)

    def _order(self, request_id: int) -> tuple[int, float, int]:
        """As policies serve them."""
        message = self._entries[request_id].message
        return message.placement.priority, message.arrival_time, request_id


def _resumed(entry: _Entry) -> AddRequest:
    """Its siblings may be elsewhere, and who has its prompt's KV has given it away: both only save work."""
    return msgspec.structs.replace(
        entry.message,
        output_token_ids=list(entry.output),
        num_prompt_logprobs=entry.num_prompt_logprobs,
        fork_of=None,
        source=None,
    )


def _blamed(request_id: int) -> RequestUpdate:
    return RequestUpdate(request_id=request_id, finish_reason=FinishReason.ERROR, error=refusal())


def refusal() -> str:
    return (
        f"{PoisonRequestError.BEGINNING}, or of one with the same prompt and parameters. It is not computed "
        "again for some time."
    )


def is_restarting(states: Sequence[str]) -> bool:
    """Whether no core serves, but one will. states: of each core, see `ReplicaCores.states`."""
    return "restarting" in states and set(states) <= {"restarting", "stopped"}


def fingerprint(message: AddRequest) -> bytes:
    """Of the prompt and the parameters, without the seed, which the front end may have drawn."""
    decoding = msgspec.structs.replace(message.decoding, seed=0)
    what = (message.prompt_token_ids, decoding, message.placement.adapter)
    return hashlib.blake2b(
        msgspec.json.encode(what, order="deterministic"), digest_size=16
    ).digest()
