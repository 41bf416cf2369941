"""KV events over real sockets: order, replay, a full queue, and what an engine publishes."""

from __future__ import annotations

import socket
import time

import msgspec
import pytest
import zmq

from quire import LLM, SamplingParams
from quire.config import from_flat
from quire.config.kv_events import KVEvents
from quire.engine.kv_events import (
    END_OF_REPLAY,
    NUMBERS_OF_A_CORE,
    EventWriter,
    KVEventPublisher,
    KVEventStream,
)
from quire.errors import ConfigError
from quire.kvcache import CacheKey, ChangeLog, KVCacheManager
from tests.kvcache.subscriber import Index, decode
from tests.kvcache.test_observer import index_of

SECONDS = 20
ENDPOINTS = {"endpoint": "tcp://127.0.0.1:0", "bind": True, "replay_endpoint": "tcp://127.0.0.1:0"}


class Subscriber:
    """A SUB socket and an index, and a DEALER for replays."""

    def __init__(self, endpoint: str, replay: str | None = None, topic: bytes = b"") -> None:
        self.context, self.index = zmq.Context(), Index()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.setsockopt(zmq.SUBSCRIBE, topic)
        self.dealer = self.context.socket(zmq.DEALER)
        for each, address in ((self.sub, endpoint), (self.dealer, replay)):
            each.setsockopt(zmq.RCVTIMEO, SECONDS * 1000)
            each.setsockopt(zmq.LINGER, 0)
            if address is not None:
                each.connect(address)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def ask(self, start: int) -> list[tuple[int, bytes]]:
        self.dealer.send_multipart([b"", start.to_bytes(8, "big")])
        found = []
        while True:
            _, _, number, payload = self.dealer.recv_multipart()
            if number == END_OF_REPLAY:
                return found
            found.append((int.from_bytes(number, "big"), payload))

    def receive(self) -> tuple[bytes, int, bytes]:
        topic, number, payload = self.sub.recv_multipart()
        return topic, int.from_bytes(number, "big"), payload

    def wait_for(self, sequence: int) -> None:
        """Take messages, those that were missed by replay, until there were so many."""
        end = time.monotonic() + SECONDS
        while self.index.next < sequence and time.monotonic() < end:
            if self.sub.poll(50):
                _, number, payload = self.receive()
                if number > self.index.next:
                    for each in self.ask(self.index.next):
                        self.index.take(*each)
                self.index.take(number, payload)
            else:
                for each in self.ask(self.index.next):
                    self.index.take(*each)
        assert self.index.next == sequence


@pytest.fixture
def kv():
    return KVCacheManager(7, 4, enable_prefix_caching=True)


@pytest.fixture
def stream(kv):
    stream = KVEventStream(KVEvents(topic="kv@pod@model", **ENDPOINTS), kv, rank=3)
    yield stream
    stream.close()


def compute(kv: KVCacheManager, request_id: int, tokens: list[int]) -> None:
    match = kv.match_prefix(request_id, tokens, CacheKey(), request_id)
    kv.admit(request_id, match, CacheKey(), len(tokens))
    kv.register(request_id, tokens, len(tokens), request_id)
    kv.release(request_id)


def test_a_subscriber_who_joins_late_and_asks_has_the_pools_index(kv, stream) -> None:
    publisher = stream.publisher
    with Subscriber(publisher.endpoint, publisher.replay_endpoint, b"kv@") as early:
        for number in range(1, 30):
            compute(kv, number, [number % 5] * (4 * (number % 4) + 5))
            if number % 11 == 0:
                kv.reset_cache()
            stream.flush(())
        with Subscriber(publisher.endpoint, publisher.replay_endpoint) as late:
            for each in (early, late):
                each.wait_for(29)
                assert each.index.num_gaps == 0
                assert each.index.blocks == index_of(kv.pool, EventWriter(4), 4) != {}


def test_a_core_that_was_started_again_clears_what_subscribers_know(kv, stream) -> None:
    compute(kv, 1, [1] * 9)
    stream.flush(())
    publisher = stream.publisher
    with Subscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber:
        subscriber.wait_for(1)
        assert subscriber.index.blocks
        empty = KVCacheManager(7, 4, enable_prefix_caching=True)
        again = KVEventStream(KVEvents(**ENDPOINTS), empty, rank=3, restarts=2)
        try:
            compute(empty, 1, [2] * 9)
            again.flush(())
            with Subscriber(again.publisher.endpoint, again.publisher.replay_endpoint) as late:
                [cleared, stored] = late.ask(subscriber.index.next)
        finally:
            again.close()
        assert cleared[0] == 2 * NUMBERS_OF_A_CORE > subscriber.index.next
        assert stored[0] == cleared[0] + 1
        for number, payload in (cleared, stored):
            subscriber.index.next = number
            subscriber.index.take(number, payload)
        assert subscriber.index.blocks == index_of(empty.pool, EventWriter(4), 4) != {}


def test_the_three_frames(kv, stream) -> None:
    with Subscriber(stream.publisher.endpoint, topic=b"kv@pod@") as subscriber:
        number, end = 0, time.monotonic() + SECONDS
        while not subscriber.sub.poll(20) and time.monotonic() < end:  # it connects
            number += 1
            compute(kv, number, [number] * 5)
            stream.flush(())
        topic, sequence, payload = subscriber.receive()
        assert topic == b"kv@pod@model" and sequence < number
        seconds, events, rank = msgspec.msgpack.decode(payload)
        assert abs(seconds - time.time()) < 100 and rank == 3
        block_hash = int.from_bytes(kv.hashes_of(99, [sequence + 1] * 4, CacheKey())[0][-8:], "big")
        assert events[-1] == {
            "type": "BlockStored", "block_hashes": [block_hash], "parent_block_hash": None,
            "token_ids": [sequence + 1] * 4, "block_size": 4, "lora_id": None, "medium": "GPU",
            "lora_name": None, "group_idx": 0, "kv_cache_spec_kind": "full_attention",
        }  # fmt: skip


def test_a_full_queue_drops_a_batch_leaves_a_gap_and_is_mended(kv) -> None:
    stream = KVEventStream(KVEvents(max_queue_size=1, **ENDPOINTS), kv)
    publisher = stream.publisher
    try:
        publisher._queue.append((10**6, 0.0, ()))  # the thread is not awake, so it stays full
        compute(kv, 1, [1] * 5)
        stream.flush(())
        assert publisher.num_dropped == 1
        compute(kv, 2, [2] * 9)
        publisher._queue.clear()
        stream.flush(())
        with Subscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber:
            ((number, payload),) = subscriber.ask(0)
            assert number == 1
            subscriber.index.take(number, payload)
            assert subscriber.index.blocks == index_of(kv.pool, EventWriter(4), 4) != {}
            assert type(decode(payload).events[0]).__name__ == "AllBlocksCleared"
    finally:
        stream.close()


def test_only_the_latest_batches_are_replayed_and_nonsense_is_ignored(kv) -> None:
    stream = KVEventStream(KVEvents(buffer_steps=3, **ENDPOINTS), kv)
    try:
        with Subscriber(stream.publisher.endpoint, stream.publisher.replay_endpoint) as subscriber:
            for number in range(1, 8):
                compute(kv, number, [number] * 5)
                stream.flush(())
            for nonsense in ([b""], [b"", b"x"], [b"a", b"b", b"c"], [b"x" * 9], [b"", b"", b""]):
                subscriber.dealer.send_multipart(nonsense)
            assert [number for number, _ in subscriber.ask(0)] == [4, 5, 6]
            assert [number for number, _ in subscriber.ask(6)] == [6]
            assert subscriber.ask(2**64 - 1) == []
    finally:
        stream.close()


def test_a_port_in_use_is_an_error_that_says_so() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for key in ("endpoint", "replay_endpoint"):
            config = KVEvents(**{**ENDPOINTS, key: f"tcp://127.0.0.1:{port}"})
            with pytest.raises(ConfigError, match=f"{key} .*{port}.*cannot be used"):
                KVEventPublisher(config, EventWriter(4))


def test_an_engine_publishes_what_its_steps_have_computed() -> None:
    events = {"enable_kv_cache_events": True, "block_hashes": "bytes", **ENDPOINTS}
    llm = LLM(num_gpu_blocks_override=140, max_model_len=2048, kv_events_config=events)
    try:
        core = llm._core._core
        publisher = core._events.publisher
        with Subscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber:
            params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            for word in ("one ", "two ", "three ", "one "):
                llm.generate([word * 800, word * 100], params)
            subscriber.wait_for(publisher._next)
            writer = EventWriter(16, as_bytes=True)
            kv = core.scheduler.kv
            assert subscriber.index.blocks == index_of(kv.pool, writer, 16)
            assert len(subscriber.index.blocks) > 50 and publisher.num_dropped == 0
            llm.reset_prefix_cache()
            subscriber.wait_for(publisher._next)
            assert subscriber.index.blocks == {}
    finally:
        llm.close()


@pytest.fixture(scope="module")
def tiered(tmp_path_factory):
    events = {"enable_kv_cache_events": True, "block_hashes": "bytes", **ENDPOINTS}
    llm = LLM(
        num_gpu_blocks_override=60, max_model_len=512, max_num_seqs=2, kv_events_config=events,
        swap_space=0.5 / 1024, kv_disk_path=str(tmp_path_factory.mktemp("kv")), kv_disk_size=0.02,
    )  # fmt: skip
    yield llm
    llm.close()


def known(index: Index, medium: str) -> set[tuple[bytes, int]]:
    return {(name, group) for name, group, where in index.blocks if where == medium}


def test_tiers_are_media_and_sleep_clears_all(tiered) -> None:
    core = tiered._core._core
    publisher = core._events.publisher
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def run(number: int) -> None:
        tiered.generate([{"prompt_token_ids": [number * 50 + i % 47 for i in range(300)]}], params)

    def settle() -> tuple[set, set]:
        """What both tiers have, when all is saved and published."""
        store = core.executor.store
        end = time.monotonic() + SECONDS
        while len(store._staging) and time.monotonic() < end:
            time.sleep(0.005)
        core._publish()
        subscriber.wait_for(publisher._next)
        ram, disk = store.tiers
        return set(ram._entries), set(disk._index)

    with Subscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber:
        for number in range(1, 9):
            run(number)
        ram, disk = settle()
        index = subscriber.index
        assert known(index, "CPU") == ram and known(index, "STORAGE") == disk > ram
        assert core.executor.store.tiers[0].counts["evicted_blocks"] > 0
        for (_, _, medium), (parent, tokens, *_) in index.blocks.items():
            assert len(tokens) == 16 and (parent is None) == (tokens[0] % 50 == 0), medium
        run(1)  # from a tier: announced as the device's too
        ram, disk = settle()
        assert known(index, "CPU") == ram and known(index, "STORAGE") == disk
        assert known(index, "GPU") & disk
        tiered.sleep()
        subscriber.wait_for(publisher._next)
        assert index.blocks == {}
        tiered.wake_up()
        for number in range(1, 5):
            run(number)
        ram, disk = settle()
        assert known(index, "CPU") == ram and known(index, "STORAGE") == disk != set()
        tiered.reset_prefix_cache()
        run(9)
        settle()
        assert len(known(index, "GPU")) == 18 and not known(index, "CPU")


def test_sleep_without_tiers_clears_all_at_once() -> None:
    events = {"enable_kv_cache_events": True, **ENDPOINTS}
    llm = LLM(num_gpu_blocks_override=40, max_model_len=256, kv_events_config=events)
    try:
        publisher = llm._core._core._events.publisher
        with Subscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber:
            llm.generate(["one " * 100], SamplingParams(max_tokens=1))
            subscriber.wait_for(publisher._next)
            assert subscriber.index.blocks != {}
            llm.sleep()
            subscriber.wait_for(publisher._next)
            assert subscriber.index.blocks == {}
    finally:
        llm.close()


def test_nothing_is_made_when_they_are_off() -> None:
    llm = LLM(num_gpu_blocks_override=20, max_model_len=256)
    try:
        assert llm._core._core._events is None
        observers = llm._core._core.scheduler.kv.pool.observers
        assert not any(isinstance(observer, ChangeLog) for observer in observers)
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"endpont": "tcp://*:1"}, "no key 'endpont'"),
        ({"endpoint": "inproc://x"}, "must be tcp://HOST:PORT or ipc://PATH"),
        ({"replay_endpoint": "tcp://*"}, "must be tcp://HOST:PORT"),
        ({"endpoint": "tcp://*:70000"}, "must be tcp://HOST:PORT"),
        ({"hwm": "1"}, "hwm must be an integer, got '1'"),
        ({"hwm": True}, "hwm must be an integer"),
        ({"buffer_steps": 0}, "buffer_steps must be at least 1"),
        ({"publisher": "kafka"}, "publisher must be one of zmq, null"),
        ({"block_hashes": "hex"}, "block_hashes must be one of int, bytes"),
        ({"enable_kv_cache_events": 1}, "must be true or false"),
        ({"topic": None}, "topic must be a string"),
    ],
)
def test_wrong_keys_are_errors(keys, problem) -> None:
    with pytest.raises(ConfigError) as caught:
        from_flat({"kv_events_config": keys})
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "rank", "endpoint", "binds", "replay"),
    [
        ({}, 0, "tcp://127.0.0.1:5557", True, None),
        ({}, 2, "tcp://127.0.0.1:5559", True, None),
        ({"endpoint": "tcp://*:5557"}, 1, "tcp://*:5558", True, None),
        ({"endpoint": "tcp://router:5557"}, 1, "tcp://router:5558", False, None),
        ({"endpoint": "tcp://127.0.0.1:6000", "bind": True}, 0, "tcp://127.0.0.1:6000", True, None),
        ({"endpoint": "ipc:///tmp/a"}, 1, "ipc:///tmp/a_dp1", True, None),
        ({"replay_endpoint": "tcp://*:5600"}, 1, "tcp://127.0.0.1:5558", True, "tcp://*:5601"),
        ({"endpoint": "tcp://*:0"}, 3, "tcp://*:0", True, None),
    ],
)
def test_endpoints_of_replicas(keys, rank, endpoint, binds, replay) -> None:
    events = from_flat({"kv_events_config": keys}).kv_events.events.of_rank(rank)
    assert (events.endpoint, events.binds, events.replay_endpoint) == (endpoint, binds, replay)


@pytest.mark.parametrize(
    ("keys", "is_on"),
    [
        ({}, False),
        ({"publisher": "zmq"}, False),
        ({"enable_kv_cache_events": True}, True),
        ({"enable_kv_cache_events": True, "publisher": "null"}, False),
        ({"enable_kv_cache_events": True, "publisher": None}, True),
    ],
)
def test_when_they_are_on(keys, is_on) -> None:
    assert from_flat({"kv_events_config": keys}).kv_events.events.is_on is is_on
