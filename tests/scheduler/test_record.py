"""The record of decisions: reading gives what an observer saw, and a replay decides the same."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace

import msgspec
import pytest

from quire.engine.core import EngineCore
from quire.executor.mock import MockExecutor
from quire.kvcache import KVCacheManager
from quire.messages import AbortRequests, Answer, Control, FinishReason, ReadRecord
from quire.placement import Placement
from quire.scheduler import DecisionKind, Scheduler, SchedulerLimits, WaitReason, record_reader
from quire.scheduler import record as codes
from quire.scheduler import scheduler as scheduler_module
from quire.scheduler.record import DIGEST_BYTES, MAGIC, Recorder, digest
from quire.scheduler.record_reader import RecordError, open_record, read
from quire.scheduler.replay import replay
from tests.scheduler.recorded_lives import begin, live
from tests.scheduler.requests import add_request

SEEDS = range(24)


class Engine:
    """With a mock executor: the tokens of a request are its id, or as `token` says."""

    def __init__(
        self, *, most_bytes=1 << 20, room=1000, token=lambda request_id, index: request_id, **limits
    ):
        ticks = itertools.count()
        self.recorder = Recorder(
            most_bytes, clock=lambda: next(ticks) * 0.25, salt=b"salt", segment_room=room
        )
        bounds = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64, **limits}
        self.scheduler = Scheduler(
            SchedulerLimits(**bounds),
            KVCacheManager(40, 4, enable_prefix_caching=True),
            record=self.recorder,
        )
        self.core = EngineCore(self.scheduler, MockExecutor(token), clock=lambda: 0.0)

    def add(self, request_id, length, **fields):
        prompt = [request_id] * length
        fields = {"max_tokens": 4, "arrival_time": float(request_id), **fields}
        self.core.handle(add_request(request_id, prompt, **fields))

    def step(self, count=1):
        for _ in range(count):
            self.core.step()

    @property
    def data(self):
        return self.recorder.dump()


@pytest.fixture(scope="module")
def lives():
    """By seed, each of so many steps."""
    found = {}
    for seed in SEEDS:
        found[seed] = begin(seed)
        live(found[seed], 60)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_the_decisions_read_are_those_that_a_log_has(lives, seed: int) -> None:
    life = lives[seed]
    history = read(life.recorder.dump())
    names = {tenant: str(life.recorder.hidden(tenant)) for tenant in life.tenants}
    seen = [replace(each, tenant=names.get(each.tenant)) for each in life.log]
    assert [decision for step in history.steps for decision in step.decisions] == seen


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_results_and_ends_are_those_that_there_were(lives, seed: int) -> None:
    life = lives[seed]
    history = read(life.recorder.dump())
    done = [step for step in history.steps if step.done is not None]
    assert [step.step_id for step in done] == [plan.step_id for plan in life.plans]
    got = dict.fromkeys(life.outputs, 0)
    for step, plan in zip(done, life.plans, strict=True):
        assert [
            (r.request_id, r.start, r.num_tokens, r.samples, r.num_drafts) for r in step.rows
        ] == [
            (
                r.request_id,
                r.start,
                r.num_tokens,
                r.samples,
                len(life.drafts_of[plan.step_id, r.request_id]),
            )
            for r in plan.rows
        ]
        assert step.planned < step.done
        for row in step.rows:
            got[row.request_id] += row.num_accepted
    assert got == life.outputs
    assert {end.request_id: end.reason for end in history.ends.values()} == life.ends
    assert {end.request_id: end.num_output_tokens for end in history.ends.values()} == life.outputs
    assert sum(end.num_preemptions for end in history.ends.values()) == life.preemptions


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replay_decides_the_same(lives, seed: int) -> None:
    assert replay(lives[seed].recorder.dump()) is None


def test_the_lives_have_what_there_is(lives) -> None:
    kinds = {(d.kind, d.reason) for life in lives.values() for d in life.log}
    reasons = {reason for kind, reason in kinds if kind is DecisionKind.WAITS}
    assert reasons >= {
        WaitReason.ARRIVED, WaitReason.BLOCKS, WaitReason.SEAT, WaitReason.BUDGET, WaitReason.PREFIX,
        WaitReason.FORK, WaitReason.TOKEN, WaitReason.SHARE, WaitReason.TARGET, WaitReason.COST,
    }  # fmt: skip
    assert {kind for kind, _ in kinds} == set(DecisionKind)
    ends = {reason for life in lives.values() for reason in life.ends.values()}
    assert ends >= {
        FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.REPETITION,
        FinishReason.EXPIRED, FinishReason.TIMEOUT,
    }  # fmt: skip
    assert {life.config["depth"] for life in lives.values()} == {1, 2, 3}
    assert {life.config["limits"].policy for life in lives.values()} == {"fcfs", "priority", "fair"}
    assert any(
        row.num_drafts for life in lives.values() for plan in life.plans for row in plan.rows
    )


def test_a_replay_names_the_first_step_that_departs(monkeypatch) -> None:
    engine = Engine()
    engine.add(1, 8)
    engine.step(2)
    engine.add(2, 50, max_tokens=2)
    engine.add(3, 20, max_tokens=2)
    engine.step(8)
    assert replay(engine.data) is None
    original = scheduler_module.least_share
    monkeypatch.setattr(
        scheduler_module, "least_share", lambda *of: min(original(*of), 4)
    )  # a change of the scheduler that matters only when there are prompts
    departure = replay(engine.data)
    assert departure is not None and departure.step_id == 1
    assert str(departure) == (
        "step 1: the record has step (8, 39, 32, 2), the replay step (4, 39, 32, 2)"
    )


def test_a_replay_that_fails_is_a_departure(monkeypatch) -> None:
    engine = Engine()
    engine.add(1, 8)
    engine.step(8)
    monkeypatch.setattr(Scheduler, "_plan_row", lambda *of: 1 // 0)
    departure = replay(engine.data)
    assert departure is not None and departure.step_id == 1
    assert departure.replayed.startswith("ZeroDivisionError")


def test_a_step_like_the_one_before_takes_few_bytes() -> None:
    engine = Engine(room=1 << 14, max_model_len=128)
    for request_id in (1, 2, 3, 4):
        engine.add(request_id, 4, max_tokens=100)
    engine.step(10)
    before = len(engine.data)
    engine.step(80)
    assert (len(engine.data) - before) / 80 < 30, "bytes per step"


def test_the_ring_is_bounded_and_what_is_left_is_read_and_verified() -> None:
    engine = Engine(most_bytes=20_000)
    for request_id in range(1, 1500):
        engine.add(request_id, 3 + request_id % 20, max_tokens=1 + request_id % 9)
        engine.step(2)
    for request_id in range(2000, 2010):
        engine.add(request_id, 20, max_tokens=40)
    engine.step(12)
    data = engine.data
    assert len(data) < 24_000
    record = open_record(data)
    assert record.header.num_dropped > 10 and len(record.segments) > 3
    history = read(data)
    last = history.steps[-1]
    assert last.step_id == engine.scheduler._step_id
    first = history.steps[0].step_id
    assert [step.step_id for step in history.steps] == list(range(first, last.step_id + 1))
    assert (last.num_running, last.num_waiting) == (
        len(engine.scheduler.running),
        len(engine.scheduler.waiting),
    )
    waiting = {request.request_id for request in engine.scheduler.waiting}
    assert waiting and waiting <= history.arrivals.keys(), "requests that live are known"
    ended = [end for end in history.ends.values() if end.request_id in history.arrivals]
    assert ended and all(end.num_output_tokens == 1 + end.request_id % 9 for end in ended)
    with pytest.raises(RecordError, match=r"dropped the first \d+ segments"):
        replay(data)


def test_a_damaged_record_is_noticed() -> None:
    engine = Engine()
    engine.add(1, 8)
    engine.step(5)
    data = engine.data
    assert len(read(data).steps) == 5
    damaged = [b"", b"text", *(data[:end] for end in range(0, len(data), 7)), data + b"x"]
    for place in range(len(data)):
        other = bytearray(data)
        other[place] ^= 1 << place % 8
        damaged.append(bytes(other))
    for each in damaged:
        with pytest.raises(RecordError):
            read(each)


def signed(body: bytes) -> bytes:
    return MAGIC + digest(body) + body


def test_a_record_that_somebody_has_made_is_an_error_and_takes_no_memory(monkeypatch) -> None:
    engine = Engine()
    engine.add(1, 8)
    engine.step(5)
    header, live, [(_, packed)] = msgspec.msgpack.decode(engine.data[len(MAGIC) + DIGEST_BYTES :])

    def made(*segments: bytes, **fields: object) -> bytes:
        chain, rows = header["chain"], []
        for body in segments:
            chain = digest(chain + body)
            rows.append((chain, zlib.compress(body)))
        return signed(msgspec.msgpack.encode((header | fields, live, rows)))

    body = zlib.decompress(packed)
    assert len(read(made(body)).steps) == 5
    state, _, times = msgspec.msgpack.decode(body)
    wrong = [made(), signed(b""), signed(b"\x91" * 100_000), signed(b"\xdd\xff\xff\xff\xff")]
    parts = ([[codes.STEP]], [[]], [3, 3, 3], [[codes.ADMITTED, 1]])
    wrong += [made(msgspec.msgpack.encode((state, part, times))) for part in parts]
    for each in wrong:
        with pytest.raises(RecordError):
            read(each)
    with pytest.raises(RecordError, match="cannot replay a record of version"):
        replay(made(body, limits={}))
    monkeypatch.setattr(record_reader, "LEAST_ROOM", 1 << 10)
    bomb = made(body, bytes(1 << 22))
    assert len(bomb) < 10_000
    with pytest.raises(RecordError, match="segment 1 has no end"):
        read(bomb)


def test_no_name_is_in_it_and_equal_blocks_have_equal_hashes_only_with_one_salt() -> None:
    def life(salt: bytes):
        engine = Engine()
        engine.recorder = recorder = Recorder(salt=salt)
        engine.scheduler = Scheduler(
            engine.scheduler.limits,
            KVCacheManager(40, 4, enable_prefix_caching=True),
            record=recorder,
        )
        engine.core = EngineCore(
            engine.scheduler, MockExecutor(lambda request_id, index: 7), clock=lambda: 0.0
        )
        place = Placement(tenant="somebody", cache_salt="secret", adapter=None)
        for request_id in (1, 2):
            message = add_request(request_id, list(range(100, 108)), max_tokens=3, placement=place)
            engine.core.handle(message)
        engine.step(8)
        return recorder.dump(), open_record(recorder.dump()).segments[0].items

    (data, items), (_, others) = life(b"a"), life(b"b")
    assert b"somebody" not in data and b"secret" not in data
    blocks = [item[2] for item in items if isinstance(item, list) and item[0] == 12]
    assert len(blocks) == 2 and blocks[0] == blocks[1] and len(blocks[0]) == 16
    assert blocks[0] not in [item[2] for item in others if isinstance(item, list) and item[0] == 12]


def test_a_request_that_waits_outside_and_one_that_is_aborted() -> None:
    engine = Engine(max_num_seqs=1)
    engine.scheduler.report.waits_outside(9, WaitReason.GRAMMAR)
    engine.add(1, 4)
    engine.add(2, 4)
    engine.step()
    engine.core.handle(AbortRequests([2, 2, 77]))
    data = engine.data
    (step,) = read(data).steps
    assert [(d.request_id, d.reason) for d in step.decisions if d.kind is DecisionKind.WAITS] == [
        (9, WaitReason.GRAMMAR), (1, WaitReason.ARRIVED), (2, WaitReason.ARRIVED),
        (2, WaitReason.SEAT),
    ]  # fmt: skip
    assert step.stopped_at == 2
    assert read(data).ends[2].reason is FinishReason.ABORT
    assert replay(data) is None


def test_what_an_engine_that_fails_leaves_is_read_and_replayed() -> None:
    engine = Engine()
    engine.add(1, 4)
    engine.add(2, 8)
    engine.step(2)
    engine.scheduler._add_row = lambda *of: 1 // 0
    with pytest.raises(ZeroDivisionError):
        engine.step()
    data = engine.data
    assert [len(step.rows) for step in read(data).steps][:2] == [2, 2]
    assert replay(data) is None, "as far as it was complete"


def test_a_control_call_reads_it() -> None:
    engine = Engine()
    answer = engine.core.handle(Control(3, ReadRecord()))
    assert isinstance(answer, Answer) and answer.id == 3
    assert [read(each).steps for each in answer.records] == [()]
    engine.scheduler.record = None
    answer = engine.core.handle(Control(4, ReadRecord()))
    assert isinstance(answer, Answer) and answer.records == [] and answer.failure is None
