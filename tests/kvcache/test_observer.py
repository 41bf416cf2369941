"""The stream of changes, replayed, is the pool's index: with evictions, resets, gaps, replays and joins."""

from __future__ import annotations

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.engine.kv_events import EventWriter
from quire.kvcache import BlockPool, CacheKey, Change, ChangeKind, ChangeLog, KVCacheManager
from quire.messages.kv_events import KVEventBatch
from tests.kvcache.subscriber import Index, decode
from tests.scheduler.test_scheduler_properties import OverlappedMachine, WindowMachine

BS = 2
KEYS = (CacheKey(), CacheKey("salt"), CacheKey(None, "sql@1a2b"), CacheKey("salt", "sql@1a2b"))


def index_of(pool: BlockPool, writer: EventWriter, size: int) -> dict:
    """What a subscriber should know."""
    found = {}
    for content, group in pool.cached():
        if len(content.tokens) < size:
            continue
        begins = isinstance(content.parent, CacheKey)
        name = content.key.adapter and content.key.adapter.partition("@")[0]
        extra = tuple(x for x in (name, content.key.salt if begins else None) if x) or None
        parent = None if begins else writer.hash_of(content.parent.block_hash)
        found[writer.hash_of(content.block_hash), group, "GPU"] = (
            parent,
            content.tokens,
            name,
            extra,
        )
    return found


class StreamMachine(RuleBasedStateMachine):
    """A tiny cache, whose publisher's queue is full now and then, over a network that loses messages."""

    @initialize(num_blocks=st.integers(4, 12), kept=st.integers(1, 20), as_bytes=st.booleans())
    def set_up(self, num_blocks, kept, as_bytes):
        windows = (None, 4)
        self.kv = KVCacheManager(
            num_blocks, BS, enable_prefix_caching=True, windows=windows, max_row_tokens=4
        )
        self.writer = EventWriter(BS, windows, as_bytes=as_bytes)
        self.log = ChangeLog(BS, self.publish, self.kv.pool.cached)
        self.kv.pool.observers = (self.log,)
        self.sent: list[tuple[int, bytes]] = []
        self.num_kept = kept
        self.sequence = 0
        self.is_full = self.is_lost = False
        self.index, self.is_whole = Index(), True
        self.step = self.next_id = 0

    def publish(self, changes) -> bool:
        number, self.sequence = self.sequence, self.sequence + 1
        if self.is_full:
            return False
        payload = msgspec.msgpack.encode(KVEventBatch(1.0, self.writer.write(changes), 0))
        self.sent = [*self.sent, (number, payload)][-self.num_kept :]
        if not self.is_lost:
            self.receive(number, payload)
        return True

    def receive(self, number: int, payload: bytes) -> None:
        if number > self.index.next:  # a gap: ask for what was missed
            for each in self.sent:
                if each[0] >= self.index.next and each[0] < number:
                    self.take(*each)
        self.take(number, payload)

    def take(self, number: int, payload: bytes) -> None:
        gaps = self.index.num_gaps
        self.index.take(number, payload)
        cleared = type(decode(payload).events[0]).__name__ == "AllBlocksCleared"
        self.is_whole = (self.is_whole and self.index.num_gaps == gaps) or cleared

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7), key=st.sampled_from(KEYS))
    def compute(self, tokens, key):
        self.step, self.next_id = self.step + 1, self.next_id + 1
        match = self.kv.match_prefix(self.next_id, tokens, key, self.step)
        if self.kv.blocks_needed(match, len(tokens)) <= self.kv.num_free:
            self.kv.admit(self.next_id, match, key, len(tokens))
            self.kv.register(self.next_id, tokens, len(tokens), self.step)
        self.kv.forget(self.next_id)

    @precondition(lambda self: self.kv.tables)
    @rule(data=st.data())
    def release(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.kv.tables)))
        self.kv.slide(request_id, len(self.kv.tables[request_id].contents) * BS)
        self.kv.release(request_id, [0] * 8, step_id=self.step)

    @rule()
    def reset(self):
        self.kv.reset_cache()

    @rule(is_full=st.booleans(), is_lost=st.booleans())
    def change_weather(self, is_full, is_lost):
        self.is_full, self.is_lost = is_full, is_lost

    @rule()
    def join(self):
        """A new subscriber, who asks for all that is kept."""
        self.index, self.is_whole = Index(), True
        for each in self.sent:
            self.take(*each)

    @rule()
    def flush(self):
        self.log.flush(())
        ours = self.index.blocks
        theirs = index_of(self.kv.pool, self.writer, BS)
        if self.index.next == self.sequence and not self.log._is_broken:
            if self.is_whole:
                assert ours == theirs
            else:
                assert ours.items() <= theirs.items()

    @invariant()
    def consistent(self):
        if hasattr(self, "kv"):
            self.kv.check_invariants()


TestStream = StreamMachine.TestCase
TestStream.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


class StepsMachine(WindowMachine):
    """Changes are published when their step is done, and no step later."""

    max_in_flight = 1
    layouts = ((None,), (None, 5), (4,))

    def make_executor(self, *sizes, **options):
        kv = self.scheduler.kv
        self.index: set[tuple[bytes, int]] = set()
        self.log = ChangeLog(kv.block_size, self.publish, kv.pool.cached)
        kv.pool.observers = (self.log,)
        return super().make_executor(*sizes, **options)

    def publish(self, changes) -> bool:
        under_way = [plan.step_id for plan, _ in self.core._in_flight]
        for change in changes:
            name = change.content and (change.content.block_hash, change.group)
            if change.kind is ChangeKind.STORED:
                self.index.add(name)
                block = change.content.blocks[change.group]
                assert block is None or not under_way or block.step_id < under_way[0]
            elif change.kind is ChangeKind.REMOVED:
                self.index.discard(name)
            else:
                self.index.clear()
        return True

    @invariant()
    def is_followed(self):
        if not hasattr(self, "core"):
            return
        self.core._events = self.log
        if not self.core._in_flight:
            self.core._publish()
            size = self.scheduler.kv.block_size
            assert self.index == {
                (content.block_hash, group)
                for content, group in self.scheduler.kv.pool.cached()
                if len(content.tokens) == size
            }


class OverlappedStepsMachine(StepsMachine, OverlappedMachine):
    max_in_flight = 2


TestSteps = StepsMachine.TestCase
TestOverlappedSteps = OverlappedStepsMachine.TestCase
TestSteps.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestOverlappedSteps.settings = TestSteps.settings


def test_an_idle_pool_has_nobody_to_call() -> None:
    assert BlockPool(3).observers == ()


def test_a_step_in_flight_holds_its_changes_back() -> None:
    seen: list[Change] = []
    kv = KVCacheManager(9, BS, enable_prefix_caching=True)
    log = ChangeLog(BS, lambda changes: seen.extend(changes) or True, kv.pool.cached)
    kv.pool.observers = (log,)
    kv.admit(1, kv.no_match(), KEYS[0], 4)
    kv.register(1, [1, 2, 3, 4], 2, 1)
    log.flush([1])
    assert seen == []
    kv.register(1, [1, 2, 3, 4], 4, 2)
    log.flush([2])
    assert [change.content.tokens for change in seen] == [(1, 2)]
    log.flush([])
    assert [change.content.tokens for change in seen] == [(1, 2), (3, 4)]


def test_consecutive_blocks_are_one_event() -> None:
    changes: list[Change] = []
    kv = KVCacheManager(9, BS, enable_prefix_caching=True)
    log = ChangeLog(BS, lambda each: changes.extend(each) or True, kv.pool.cached)
    kv.pool.observers = (log,)
    kv.admit(1, kv.no_match(), KEYS[3], 6)
    kv.register(1, [1, 2, 3, 4, 5, 6], 6, 1)
    log.flush(())
    (event,) = EventWriter(BS).write(changes)
    assert (event.token_ids, event.parent_block_hash) == ([1, 2, 3, 4, 5, 6], None)
    assert event.extra_keys == [["sql", "salt"], ["sql"], ["sql"]]
    assert (event.lora_name, event.lora_id, event.group_idx) == ("sql", None, 0)


def test_content_that_gives_way_is_removed_from_every_group() -> None:
    seen: list[Change] = []
    pool = BlockPool(5, num_groups=2)
    log = ChangeLog(1, lambda changes: seen.extend(changes) or True, pool.cached)
    pool.observers = (log,)
    first, second, third = pool.allocate(3)
    pool.register([first, second], b"h", KEYS[0], (1,), 1)
    pool.register([third, pool.null_block], b"h", KEYS[1], (1,), 1)
    log.flush(())
    assert [(change.kind.value, change.group) for change in seen] == [
        ("stored", 0), ("stored", 1), ("removed", 0), ("removed", 1), ("stored", 0),
    ]  # fmt: skip
