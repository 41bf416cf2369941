"""Gives a new scheduler what a recorded one was given, and compares what it decides.

The clock shows the recorded times. Tokens are absent, but all that a scheduler does with them is to compare
blocks of them: the first token of a block stands for the block's recorded hash, and all others are 0. What
is compared within blocks is in the record. A request ends where it has ended, since its last token is made
an end token then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from quire.decoding import Decoding, Task
from quire.kvcache import KVCacheManager
from quire.kvcache.block import BlockContent
from quire.kvcache.retention import Retention
from quire.messages import (
    AddRequest,
    FinishReason,
    PlannedRow,
    PromptLogprobs,
    SampledRow,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from quire.placement import Placement, Retain
from quire.sampling_params import RepetitionDetectionParams
from quire.scheduler import record as codes
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.record import Added, Recorder
from quire.scheduler.record_reader import Item, Record, RecordError, calls_of, open_record
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.util.version import VERSION

NO_DRAFT = -1
"""Is never sampled."""


@dataclass(frozen=True, slots=True)
class Departure:
    """The first call in which the replay is not as the record."""

    step_id: int
    """The last step that was begun."""
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return f"step {self.step_id}: the record has {self.recorded}, the replay {self.replayed}"


def replay(data: bytes) -> Departure | None:
    """None if the replay decides the same in every step, and so has the same chain. Raises `RecordError` if
    it is no whole record."""
    record = open_record(data)
    if not record.is_whole:
        raise RecordError(
            f"The ring has dropped the first {record.header.num_dropped} segments of this record, and what "
            "follows from them cannot be replayed without them. Make decision_record_bytes larger."
        )
    if record.header.has_stores:
        raise RecordError(
            "The record is of an engine that loads KV from outside the cache (kv_offloading_size, "
            "kv_disk_path, kv_transfer_config); what its stores had is not recorded."
        )
    try:
        begun = _Replay(record)
    except (LookupError, TypeError, ValueError) as error:
        raise RecordError(
            f"This version ({VERSION}) cannot replay a record of version {record.header.version}: {error}"
        ) from error
    return begun.run()


class _Source(Recorder):
    """The recorder of the replay: its inputs are the recorded ones."""

    def __init__(self, blocks: dict[int, bytes]) -> None:
        self._recorded_times: Iterator[float] = iter(())
        super().__init__(1 << 62, clock=self._next_time, salt=b"")
        self._blocks = blocks
        self.added: Added | None = None
        self._found: deque[Item] = deque()
        self._tails: deque[Item] = deque()

    @property
    def log(self) -> list[object]:
        return self._log

    @property
    def chain(self) -> bytes:
        return self._chain

    @property
    def step_id(self) -> int:
        return self._step_id

    def begin_segment(self, times: Sequence[float]) -> None:
        self._recorded_times = iter(times)

    def begin_call(self, items: list[Item]) -> None:
        of = [item for item in items if isinstance(item, list)]
        self._found = deque(item for item in of if item[0] == codes.FOUND)
        self._tails = deque(item for item in of if item[0] == codes.TAIL)

    def _next_time(self) -> float:
        return next(self._recorded_times, 0.0)

    def add(self, request: Request, message: AddRequest) -> None:
        assert self.added is not None
        self._adds[request.request_id] = self.added
        self._item(self.added)
        self._lookups = 0

    def named(self, tail_hash: bytes) -> bytes:
        name = self._tails.popleft()[1] if self._tails else tail_hash
        self._item((codes.TAIL, name))
        return name

    def shared(
        self, tails: Sequence[BlockContent], best: BlockContent | None, count: int
    ) -> tuple[BlockContent | None, int]:
        self._lookups += 1
        if not self._found or self._found[0][1] != self._lookups:
            return None, 0
        item = self._found.popleft()
        _, _, index, count = item
        self._item(tuple(item))
        return (tails[index], count) if index < len(tails) else (None, 0)

    def blocks_of(self, request: Request) -> bytes:
        return self._blocks.get(request.request_id, b"")

    def _make_room(self) -> None:
        """Segments end where they did."""


class _Replay:
    def __init__(self, record: Record) -> None:
        self._record = record
        header = record.header
        self._size = header.block_size
        blocks = {added.request_id: hashes for added, hashes in record.live}
        for segment in record.segments:
            for item in segment.items:
                if isinstance(item, list) and item[0] == codes.BLOCKS:
                    blocks[item[1]] = item[2]
        self._blocks = blocks
        self._numbers: dict[bytes, int] = {}
        """Of hashes, in the order in which they are used."""
        self._source = _Source(blocks)
        kv = KVCacheManager(
            header.num_blocks,
            header.block_size,
            enable_prefix_caching=header.caching,
            windows=header.windows,
            max_row_tokens=header.max_row_tokens,
            retention=Retention(header.most_retained, clock=self._source.clock),
        )
        self._scheduler = Scheduler(
            msgspec.convert(header.limits, SchedulerLimits),
            kv,
            record=self._source,
            needs_token_before_next=lambda message: self._added.needs_token_before_next,
            takes_drafts=lambda message: self._added.takes_drafts,
        )
        self._scheduler.worth.least_steps = header.least_steps
        self._in_flight: deque[StepPlan] = deque()

    @property
    def _added(self) -> Added:
        assert self._source.added is not None
        return self._source.added

    def run(self) -> Departure | None:
        source, last = self._source, self._record.segments[-1]
        for segment in self._record.segments:
            source.begin_segment(segment.times)
            calls = list(calls_of(segment.items))
            for number, items in enumerate(calls):
                is_last = segment is last and number == len(calls) - 1
                departure = self._call(items, is_last=is_last)
                if departure is not None:
                    return departure
            source.seal()
            if source.chain != segment.chain and segment is not last:
                return Departure(
                    source.step_id, "another chain", "the same decisions with another state"
                )
        return None

    def _call(self, items: list[Item], *, is_last: bool) -> Departure | None:
        """is_last: of the record, so that it may be incomplete, because the engine failed in it."""
        source = self._source
        begin = len(source.log)
        source.begin_call(items)
        failure = None
        try:
            self._carry_out(items)
        except Exception as error:  # a departure has led to a state that cannot be
            failure = f"{type(error).__name__}: {error}"
        done = source.log[begin:]
        encode = msgspec.msgpack.encode
        for index, item in enumerate(items):
            found = done[index] if index < len(done) else failure or "nothing"
            if encode(item) != encode(found):
                return Departure(source.step_id, described(item), described(found))
        if is_last:
            return None
        if failure is not None or len(done) > len(items):
            more = described(failure or done[len(items)])
            return Departure(source.step_id, "nothing", more)
        return None

    # --- calls ------------------------------------------------------------------------------------

    def _carry_out(self, items: list[Item]) -> None:
        first, scheduler = items[0], self._scheduler
        if first is None:
            scheduler.take_stats()
        elif isinstance(first, int):
            plan = self._in_flight.popleft()
            scheduler.update(plan, self._result(plan.step_id, plan.rows, items[1:]))
        elif first[0] == codes.STEP:
            plan = scheduler.schedule()
            if plan.rows or not self._in_flight:
                self._in_flight.append(plan)
        elif first[0] == codes.ADD:
            scheduler.add_request(self._message(Added(*first)))
        elif first[0] == codes.ABORT:
            scheduler.abort(first[1], FinishReason(first[2]))
        elif first[0] == codes.RESET:
            scheduler.reset_prefix_cache()
        elif first[0] == codes.NOTE:
            self._source.waits_outside(first[1], first[2])

    def _message(self, added: Added) -> AddRequest:
        self._source.added = added
        length = added.num_prompt_tokens
        tokens = self._tokens(added.request_id, 0, length + added.num_output_tokens)
        decoding = Decoding(
            task=Task.GENERATE if added.generates else Task.SCORE,
            max_tokens=added.max_tokens,
            prompt_logprobs=0 if added.prompt_logprobs else None,
            first_prompt_logprob=added.first_prompt_logprob,
            reads_prefix_cache=added.reads_prefix_cache,
        )
        placement = Placement(
            priority=added.priority,
            weight=added.weight,
            tenant=str(added.tenant),
            cache_salt=_name(added.salt),
            adapter=_name(added.adapter),
            retain=tuple(Retain(seconds, count) for seconds, count in added.retain),
        )
        return AddRequest(
            request_id=added.request_id,
            prompt_token_ids=tokens[:length],
            output_token_ids=tokens[length:],
            decoding=decoding,
            placement=placement,
            arrival_time=added.arrival_time,
            fork_of=added.fork_of,
            num_prompt_logprobs=added.num_prompt_logprobs,
        )

    def _tokens(self, request_id: int, start: int, count: int) -> list[int]:
        """Stand-ins for so many tokens of a request."""
        tokens, size = [0] * count, self._size
        hashes = self._blocks.get(request_id, b"")
        for position in range(start + -start % size, start + count, size):
            at = position // size * codes.HASH_BYTES
            block = hashes[at : at + codes.HASH_BYTES]
            if block:
                number = self._numbers.setdefault(block, len(self._numbers) + 1)
                tokens[position - start] = number
        return tokens

    # --- results ----------------------------------------------------------------------------------

    def _result(self, step_id: int, rows: list[PlannedRow], items: list[Item]) -> StepResult:
        result = StepResult(step_id=step_id)
        learned: dict[int, list[int]] = {}
        ends: dict[int, Item] = {}
        for item in items:
            if item[0] == codes.LEARNED:
                size = codes.LEARNED_FIELDS
                for index in range(1, len(item), size):
                    learned[item[index]] = item[index + 1 : index + size]
            elif item[0] == codes.FINISHED:
                ends[item[1]] = item
            elif item[0] == codes.DRAFT_TIME:
                result.draft_seconds = item[1]
        for row in rows:
            request = self._scheduler.requests.get(row.request_id)
            if request is None:
                continue
            news, end = learned.get(row.request_id), ends.get(row.request_id)
            failed = end is not None and end[2] == FinishReason.ERROR
            if row.samples or news is not None or failed:
                result.sampled.append(self._sampled(row, request, news, end, failed=failed))
        return result

    def _sampled(
        self,
        row: PlannedRow,
        request: Request,
        news: Sequence[int] | None,
        end: Item,
        *,
        failed: bool,
    ) -> SampledRow:
        count, right, kept, logprobs = 1 if row.samples else 0, 0, 0, 0
        if news is not None:
            _, count, _, right, kept, logprobs = news
        sampled = SampledRow(request_id=row.request_id, token_ids=[])
        if logprobs:
            entries = [TokenLogprobs(0, 0.0, 0, [], [])] * logprobs
            sampled.prompt_logprobs = PromptLogprobs(request.num_prompt_logprobs, entries)
        if failed:
            sampled.error = "as recorded"
            return sampled
        known = len(request.token_ids)
        tokens = sampled.token_ids = self._tokens(row.request_id, known, count)
        sampled.draft_token_ids = (NO_DRAFT,) * kept
        drafts = len(row.draft_token_ids)
        row.draft_token_ids = (*tokens[:right], *(NO_DRAFT,) * (drafts - right))
        if end is not None and row.samples:
            last = end[3] - (known - request.num_prompt_tokens) - 1
            request.decoding = _ending(request.decoding, end[2], end[3], tokens[last])
        return sampled


def _ending(decoding: Decoding, reason: str, num_tokens: int, token: int) -> Decoding:
    """Makes a request end for this reason after so many tokens, of which this is the last."""
    replace: Callable[..., Decoding] = msgspec.structs.replace
    if reason == FinishReason.STOP:
        return replace(decoding, min_tokens=num_tokens, end_token_ids=frozenset({token}))
    if reason == FinishReason.REPETITION:
        rule = RepetitionDetectionParams()
        # A pattern of all its tokens, once: clients may not ask for that.
        for name, value in (("max_pattern_size", num_tokens), ("min_pattern_size", num_tokens)):
            msgspec.structs.force_setattr(rule, name, value)
        msgspec.structs.force_setattr(rule, "min_count", 1)
        return replace(decoding, repetition_detection=rule)
    return decoding


def _name(number: int) -> str | None:
    return str(number) if number else None


def described(item: object) -> str:
    """An entry of the record, or what takes its place."""
    if item is None:
        return "a call for statistics"
    if isinstance(item, int):
        return "a result"
    if isinstance(item, str):
        return item
    assert isinstance(item, list | tuple)
    names = {
        number: name.lower()
        for name, number in vars(codes).items()
        if name.isupper() and name in _NAMES
    }
    return f"{names.get(item[0], item[0])} {_plain(item[1:])}"


def _plain(values: Sequence[object]) -> str:
    texts = (
        value.hex() if isinstance(value, bytes) else str(getattr(value, "value", value))
        for value in values
    )
    return "(" + ", ".join(texts) + ")"


_NAMES = frozenset(
    {
        "STEP", "ROWS", "STOPPED", "NOTE", "ADD", "ABORT", "RESET", "LEARNED", "DRAFTS",
        "DRAFT_TIME", "TAIL", "FOUND", "BLOCKS", "ADMITTED", "WAITS", "LIMITED", "PREEMPTED",
        "LATENCY", "FINISHED",
    }
)  # fmt: skip
