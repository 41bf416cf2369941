"""What a scheduler was given and what it decided, in a ring of bytes.

It is written in every step, so a step whose rows, waits and budget are as before costs a few list
operations. Records are plain tuples in one list, in the order in which things happened. A *segment* of some
hundred steps is encoded, compressed and added to the ring at once, and the oldest segments are dropped when
it is full. Each segment begins with the state that a reader needs (who runs, and how far), so what is left
can be read; and each is hashed together with the hash of the one before it (the chain).

There are two kinds of records. *Inputs* are calls (a request, an abort, a step, a result), the times that
the scheduler's clock showed, and what depends on texts. *Outputs* are decisions. `scheduler/replay.py` gives
a new scheduler the inputs and compares its outputs.

No text is in it, and no token id: lengths, and hashes of blocks of tokens and of names, keyed by a salt that
only this process knows. Two things that depend on tokens within a block are inputs, so that no hash of a few
tokens is needed: how much of a cached partial block a prompt shares, and which partial blocks are equal.
"""

from __future__ import annotations

import os
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec

from quire.kvcache import KVCacheManager
from quire.kvcache.block import BlockContent
from quire.messages import (
    AddRequest,
    FinishReason,
    PlannedRow,
    PromptLogprobs,
    SampledRow,
    StepPlan,
    StepResult,
)
from quire.placement import Placement
from quire.prefix_report import MissReason
from quire.scheduler.decisions import STOPS, Requested, Standing, Wait, WaitReason
from quire.scheduler.latency import LatencyTarget
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.loading import Loading
from quire.scheduler.policy import Policy
from quire.scheduler.queue import RequestQueue
from quire.scheduler.request import Request
from quire.scheduler.worth import Worth
from quire.util.version import VERSION

MAGIC = b"quire record 2\n"
"""Then `digest` of all that follows."""
MOST_BYTES = 8 << 20
SEGMENT_ROOM = 1 << 14
"""A segment ends when it has about so many bytes before compression."""
STEP_ROOM, ITEM_ROOM = 32, 16
HASH_BYTES, DIGEST_BYTES = 8, 16
DEFAULT_TENANT = Placement().tenant

# Codes of records, with what follows. Besides, None is a call for statistics, and a number a result: how
# many times of the segment were read before it.
STEP = 0  # quantum, free, budget, times read before
# ROWS: ids that are gone (None: all), new ids, index and tokens of each row that has not one token. Absent if
# the rows are as in the step before. Admitted requests are last, unlike in the plan.
ROWS = 1
STOPPED = 2  # the request at which admission stopped, if it is another than in the step before
NOTE = 3  # id, reason: a request waits on its way to the scheduler
ADD = 4  # see `Added`
ABORT = 5  # ids, reason
RESET = 6
LEARNED = 7  # for each result that is not just a token: see `LEARNED_FIELDS`
DRAFTS = 8  # for each row with drafts: id, proposed, verified
DRAFT_TIME = 9  # seconds
TAIL = 10  # hash of a partial block that is cached
FOUND = 11  # number of the lookup since the last call, index of the tail, tokens shared
BLOCKS = 12  # id, hashes of the full blocks that the request had at its end
ADMITTED = 13  # id, reason, needed, free, budget, tenant, counter, start
WAITS = 14  # id, reason, because_of, needed, free, budget, gain, cost, tenant, counter
LIMITED = 15  # id, needed, budget
PREEMPTED = 16  # id, because_of, needed, free, cost
LATENCY = 17  # needed, budget, target, predicted
FINISHED = 18  # id, reason, output tokens, preemptions

# id, samples planned, tokens, of them accepted, right drafts, drafts kept, new prompt logprobs
LEARNED_FIELDS = 7


def digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


class Added(NamedTuple):
    """A request as the scheduler knows it. Names are hashes, 0 for none (of tenants, for the default)."""

    code: int
    request_id: int
    time: int
    """Times read before."""
    arrival_time: float
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    fork_of: int | None
    generates: bool
    needs_token_before_next: bool
    takes_drafts: bool
    reads_prefix_cache: bool
    prompt_logprobs: bool
    first_prompt_logprob: int
    num_prompt_logprobs: int
    priority: int
    weight: float
    tenant: int
    salt: int
    adapter: int
    retain: tuple[tuple[float, int | None], ...]


class Running(NamedTuple):
    request_id: int
    num_computed_tokens: int
    num_tokens: int
    generates: bool


class State(NamedTuple):
    """Of a scheduler between two calls, for a reader that knows nothing before."""

    step_id: int = 0
    num_waiting: int = 0
    num_in_flight: int = 0
    ids: Sequence[int] = ()
    counts: Sequence[int] = ()
    """The rows of the last step."""
    running: Sequence[Running] = ()
    waits: Sequence[tuple[int, WaitReason, int | None]] = ()
    stopped_at: int | None = None
    coefficients: Sequence[float] = ()
    """Of the cost model (`scheduler/cost_model.py`)."""


class Header(msgspec.Struct, kw_only=True, frozen=True):
    version: str
    config_hash: str
    epoch: float
    """Unix time at the clock's zero."""
    limits: dict[str, object]
    num_blocks: int
    block_size: int
    caching: bool
    windows: tuple[int | None, ...]
    max_row_tokens: int
    most_retained: int
    least_steps: float
    has_stores: bool
    """Whether KV is loaded from outside the cache."""
    num_dropped: int
    """Segments that the ring has lost."""
    chain: bytes
    """Of the last that it has lost."""


class Recorded(Protocol):
    """The scheduler."""

    limits: SchedulerLimits
    kv: KVCacheManager
    requests: dict[int, Request]
    running: RequestQueue
    waiting: Policy
    latency: LatencyTarget
    worth: Worth
    loading: Loading | None


class Recorder:
    """Written by one scheduler. most_bytes: of the ring. salt: for tests."""

    def __init__(
        self,
        most_bytes: int = MOST_BYTES,
        *,
        clock: Callable[[], float] = time.monotonic,
        salt: bytes | None = None,
        config_hash: str = "",
        segment_room: int = SEGMENT_ROOM,
    ) -> None:
        self._most, self._config_hash = most_bytes, config_hash
        self._salt = os.urandom(32) if salt is None else salt
        self._key = blake2b(key=self._salt, digest_size=HASH_BYTES)
        self._log: list[object] = []
        self._times: list[float] = []
        self._epoch = time.time() - clock()
        self.clock = self._recording(clock)
        """The clock that the scheduler, and the retention of its cache, must use."""
        self._segments: deque[tuple[bytes, bytes]] = deque()
        """The chain after each, and its bytes."""
        self._size = self._num_dropped = 0
        self._chain = self._chain_before = bytes(DIGEST_BYTES)
        self._room = self._segment_room = segment_room
        self._state = State()
        self._step_id = self._in_flight = self._lookups = 0
        self._was_plain = self._has_news = False
        """Whether the last step had a row of one token for each running request; and whether since then other
        requests run, or drafts are verified."""
        self._ids: list[int] = []
        self._counts: list[int] = []
        self._waits: dict[int, Wait] = {}
        """What was recorded last of each, as in a `DecisionLog`."""
        self._stopped_at: int | None = None
        self._adds: dict[int, Added] = {}
        """Of live requests."""
        self._drafts: list[object] | None = None
        self._learned: list[object] | None = None
        """Records of this step that are not complete."""

    def attach(self, scheduler: Recorded) -> None:
        self.scheduler = scheduler
        scheduler.kv.pool.tails = self

    def _recording(self, read: Callable[[], float]) -> Callable[[], float]:
        append = self._times.append

        def clock() -> float:
            now = read()
            append(now)
            return now

        return clock

    # --- inputs -----------------------------------------------------------------------------------

    def add(self, request: Request, message: AddRequest) -> None:
        """The clock has been read once in this call."""
        decoding, placement = message.decoding, message.placement
        tenant = placement.tenant
        added = self._adds[message.request_id] = Added(
            ADD, message.request_id, len(self._times) - 1, message.arrival_time,
            len(message.prompt_token_ids), len(message.output_token_ids), decoding.max_tokens,
            message.fork_of, decoding.generates, request.needs_token_before_next,
            request.takes_drafts, decoding.reads_prefix_cache, decoding.prompt_logprobs is not None,
            decoding.first_prompt_logprob, message.num_prompt_logprobs, placement.priority,
            placement.weight, 0 if tenant == DEFAULT_TENANT else self.hidden(tenant),
            self.hidden(placement.cache_salt), self.hidden(placement.adapter),
            tuple((wish.seconds, wish.num_tokens) for wish in placement.retain),
        )  # fmt: skip
        self._item(added)
        self._lookups = 0

    def abort(self, request_ids: list[int], reason: FinishReason) -> None:
        known = [request_id for request_id in request_ids if request_id in self._adds]
        if known:
            self._make_room()
            self._item((ABORT, known, reason))

    def reset(self) -> None:
        self._item((RESET,))

    def result(self, result: StepResult) -> None:
        """The result of the oldest step in flight is to be applied."""
        self._make_room()
        self._in_flight -= 1
        self._learned = None
        self._log.append(len(self._times))
        if result.draft_seconds:
            self._item((DRAFT_TIME, result.draft_seconds))

    def learned(
        self,
        request: Request,
        planned: PlannedRow,
        row: SampledRow,
        num_accepted: int,
        verified: tuple[int, int] | None,
        kept: int,
        news: PromptLogprobs | None,
    ) -> None:
        """A result that is not just one token. num_accepted: of its tokens, all until one ended the request.
        verified: drafts, and those that were right. kept: drafts. news: new prompt logprobs."""
        if self._learned is None:
            self._learned = [LEARNED]
            self._log.append(self._learned)
        self._learned += (
            request.request_id, planned.samples, len(row.token_ids), num_accepted,
            verified[1] if verified else 0, kept,
            0 if news is None else len(news.entries),
        )  # fmt: skip
        self._room -= ITEM_ROOM

    def stats(self) -> None:
        self._log.append(None)

    def hidden(self, name: str | None) -> int:
        """A salted hash."""
        if name is None:
            return 0
        digest = self._key.copy()
        digest.update(name.encode())
        return int.from_bytes(digest.digest()[:6], "little") | 1

    def named(self, tail_hash: bytes) -> bytes:
        """`CachedTails`: a partial block is about to be cached."""
        digest = self._key.copy()
        digest.update(tail_hash)
        self._item((TAIL, digest.digest()))
        return tail_hash

    def shared(
        self, tails: Sequence[BlockContent], best: BlockContent | None, count: int
    ) -> tuple[BlockContent | None, int]:
        """`CachedTails`: of these, the one that shares most with a prompt, and how many tokens."""
        self._lookups += 1
        if best is not None:
            self._item((FOUND, self._lookups, tails.index(best), count))
        return best, count

    def blocks_of(self, request: Request) -> bytes:
        """Salted hashes of its full blocks, each over all blocks up to it, whatever their key."""
        if not self.scheduler.kv.enable_prefix_caching:
            return b""
        size, last, hashes = self.scheduler.kv.block_size * 4, self._salt, array("q")
        tokens = array("i", request.token_ids).tobytes()
        for start in range(0, len(tokens) - size + 1, size):
            # SipHash, with a key of this process besides the salt; a sixth of BLAKE2b's time.
            value = hash(last + tokens[start : start + size])
            hashes.append(value)
            last = self._salt + value.to_bytes(HASH_BYTES, "little", signed=True)
        return hashes.tobytes()

    # --- outputs ----------------------------------------------------------------------------------

    def step(self, step_id: int, quantum: int, free: int, budget: int) -> None:
        self._step_id, self._lookups, self._drafts = step_id, 0, None
        self._room -= STEP_ROOM
        self._log.append((STEP, quantum, free, budget, len(self._times)))

    def latency(self, needed: int, budget: int, target: float, predicted: float) -> None:
        self._item((LATENCY, needed, budget, target, predicted))

    def admitted(
        self, request_id: int, miss: MissReason | None, numbers: tuple[int, int, int], who: Standing
    ) -> None:
        """numbers: needed, free, budget."""
        self._waits.pop(request_id, None)
        self._has_news = True
        start = self.scheduler.requests[request_id].num_tokens - numbers[0]
        tenant = None if who.tenant is None else self._adds[request_id].tenant
        self._item((ADMITTED, request_id, miss, *numbers, tenant, who.counter, start))

    def waits_outside(self, request_id: int, reason: WaitReason) -> None:
        self._item((NOTE, request_id, reason))

    def preempted(self, request_id: int, wait: Wait) -> None:
        self._waits.pop(request_id, None)
        self._has_news = True
        self._item((PREEMPTED, request_id, wait.because_of, wait.needed, wait.free, wait.cost))

    def drafts(self, request_id: int, proposed: int, verified: int) -> None:
        self._waits.pop(request_id, None)
        self._has_news = True
        if self._drafts is None:
            self._drafts = [DRAFTS]
            self._log.append(self._drafts)
        self._drafts += (request_id, proposed, verified)
        self._room -= ITEM_ROOM

    def finished(self, request_id: int, reason: FinishReason) -> None:
        request = self.scheduler.requests[request_id]
        self._waits.pop(request_id, None)
        self._has_news = True
        del self._adds[request_id]
        self._item(
            (FINISHED, request_id, reason, request.num_output_tokens, request.num_preemptions)
        )
        if hashes := self.blocks_of(request):
            self._item((BLOCKS, request_id, hashes))
            self._room -= len(hashes)

    def rows(
        self,
        running: Sequence[Requested],
        wanted: Sequence[int],
        waits: Mapping[int, Wait],
        stopped_at: int | None,
        plan: StepPlan,
    ) -> None:
        """See `Reporter.rows`."""
        rows, number = plan.rows, len(running)
        self._in_flight += bool(rows) or not self._in_flight
        if waits:
            self._changes(waits)
        if stopped_at != self._stopped_at:
            self._stopped_at = stopped_at
            self._item((STOPPED, stopped_at))
        is_plain = len(rows) == number and wanted.count(1) == number and not self._has_news
        if is_plain and self._was_plain:
            return  # the same requests, in the same order, and a token of each
        self._was_plain, self._has_news = is_plain, False
        ids, counts = [row.request_id for row in rows], [row.num_tokens for row in rows]
        if len(rows) - len(plan.admitted) != number or sum(wanted) != number:
            self._short(running, wanted, waits, plan)
        if plan.admitted:  # last, where first come, first served puts them in the next step
            number = len(plan.admitted)
            ids, counts = ids[number:] + ids[:number], counts[number:] + counts[:number]
        if ids != self._ids or counts != self._counts:
            self._edit(ids, counts)

    def _edit(self, ids: list[int], counts: list[int]) -> None:
        """The rows are not those of the step before."""
        last, new = self._ids, ids
        gone: list[int] | None = None
        if ids == last:
            gone, new = [], []
        elif len(ids) > 4:
            left = set(ids)
            kept = [each for each in last if each in left]
            if ids[: len(kept)] == kept:
                gone, new = [], ids[len(kept) :]
                if len(kept) < len(last):
                    gone = [each for each in last if each not in left]
        others: list[int] = []
        if counts.count(1) != len(counts):
            for index in [index for index, count in enumerate(counts) if count != 1]:
                others += (index, counts[index])
        self._log.append((ROWS, gone, new, others))
        self._room -= 8 + 2 * (len(new) + len(others))
        self._ids, self._counts = ids, counts

    def _changes(self, waits: Mapping[int, Wait]) -> None:
        last = self._waits
        for request_id, wait in waits.items():
            known = last.get(request_id)
            if (
                known is not None
                and known.reason is wait.reason
                and known.because_of == wait.because_of
            ) or wait.reason is WaitReason.PREEMPTED:
                continue
            last[request_id] = wait
            self._wait(request_id, wait)

    def _wait(self, request_id: int, wait: Wait) -> None:
        tenant, counter = None, 0.0
        if wait.reason in STOPS:
            scheduler = self.scheduler
            standing = scheduler.waiting.standing(scheduler.requests[request_id])
            if standing.tenant is not None:
                tenant, counter = self._adds[request_id].tenant, standing.counter
        self._item(
            (
                WAITS, request_id, wait.reason, wait.because_of, wait.needed, wait.free,
                wait.budget, wait.gain, wait.cost, tenant, counter,
            )
        )  # fmt: skip

    def _short(
        self,
        running: Sequence[Requested],
        wanted: Sequence[int],
        waits: Mapping[int, Wait],
        plan: StepPlan,
    ) -> None:
        """Rows with fewer tokens than the requests wanted, and requests whose token is pending."""
        given = {row.request_id: row.num_tokens - len(row.draft_token_ids) for row in plan.rows}
        for request, count in zip(running, wanted, strict=True):
            request_id = request.request_id
            if request_id in waits:
                continue
            if not count:
                known = self._waits.get(request_id)
                if known is None or known.reason is not WaitReason.TOKEN:
                    self._waits[request_id] = _TOKEN
                    self._wait(request_id, _TOKEN)
            elif given[request_id] < count:
                self._item((LIMITED, request_id, count, given[request_id]))

    def _item(self, item: tuple[object, ...]) -> None:
        self._log.append(item)
        self._room -= ITEM_ROOM

    # --- the ring ---------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Called between two calls only, so that no call is divided."""
        if self._room <= 0:
            self.seal()

    def seal(self) -> None:
        """End the segment."""
        self._chain, data = self._encode()
        self._segments.append((self._chain, data))
        self._size += len(data) + len(self._chain)
        while self._size > self._most:
            self._chain_before, dropped = self._segments.popleft()
            self._size -= len(dropped) + len(self._chain)
            self._num_dropped += 1
        self._log.clear()
        self._times.clear()
        self._learned = self._drafts = None
        self._room, self._state = self._segment_room, self._now()

    def _encode(self) -> tuple[bytes, bytes]:
        times = array("d", self._times).tobytes()
        body = msgspec.msgpack.encode((self._state, self._log, times))
        return digest(self._chain + body), zlib.compress(body, 1)

    def _now(self) -> State:
        scheduler = self.scheduler
        return State(
            self._step_id, len(scheduler.waiting), self._in_flight, self._ids, self._counts,
            [
                Running(r.request_id, r.num_computed_tokens, r.num_tokens, r.generates)
                for r in scheduler.running
            ],
            [(i, wait.reason, wait.because_of) for i, wait in self._waits.items()],
            self._stopped_at, list(scheduler.latency.cost.coefficients),
        )  # fmt: skip

    def dump(self) -> bytes:
        """All of it, to be read by `scheduler/record_reader.py`. Changes nothing."""
        kv, limits = self.scheduler.kv, self.scheduler.limits
        header = Header(
            version=VERSION, config_hash=self._config_hash, epoch=self._epoch,
            limits=asdict(limits), num_blocks=kv.num_usable + 1, block_size=kv.block_size,
            caching=kv.enable_prefix_caching, windows=kv.windows, max_row_tokens=kv.max_row_tokens,
            most_retained=kv.pool.retention.most, least_steps=self.scheduler.worth.least_steps,
            has_stores=self.scheduler.loading is not None, num_dropped=self._num_dropped,
            chain=self._chain_before,
        )  # fmt: skip
        live = [
            (added, self.blocks_of(self.scheduler.requests[request_id]))
            for request_id, added in self._adds.items()
        ]
        segments: Iterable[tuple[bytes, bytes]] = [*self._segments, self._encode()]
        body = msgspec.msgpack.encode((header, live, segments))
        return MAGIC + digest(body) + body


_TOKEN = Wait(WaitReason.TOKEN)
