"""Publishes KV events over ZeroMQ, from a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import zmq

from quire.config.kv_events import KVEvents
from quire.errors import ConfigError
from quire.kvcache import KVCacheManager, TierChanges, Transfers
from quire.kvcache.block import BlockContent, CacheKey
from quire.kvcache.observer import Change, ChangeKind, ChangeLog
from quire.messages.kv_events import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
)

logger = logging.getLogger(__name__)

NUMBERS_OF_A_CORE = 2**40
"""More batches than an engine core publishes in its life."""
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
MEDIA = {None: "GPU", "ram": "CPU", "disk": "STORAGE"}
"""vLLM's words, by the tier; None is the cache that the model reads, on every device."""


class EventWriter:
    """Changes to events."""

    def __init__(
        self, block_size: int, windows: Sequence[int | None] = (None,), *, as_bytes: bool = False
    ) -> None:
        """windows: of each group. as_bytes: hashes are whole, not 64 bits of them."""
        self._block_size, self._windows, self._as_bytes = block_size, windows, as_bytes

    def write(self, changes: Sequence[Change]) -> list[KVEvent]:
        """Consecutive changes become one event where they can."""
        events: list[KVEvent] = []
        before: Change | None = None
        for change in changes:
            last = events[-1] if events else None
            content, where = change.content, (change.group, change.tier)
            is_there = before is not None and (before.group, before.tier) == where
            if change.kind is ChangeKind.CLEARED:
                events.append(AllBlocksCleared())
            elif change.kind is ChangeKind.REMOVED:
                if not (is_there and isinstance(last, BlockRemoved)):
                    last = BlockRemoved(
                        block_hashes=[], medium=MEDIA[change.tier], group_idx=change.group
                    )
                    events.append(last)
                last.block_hashes.append(self.hash_of(change.block_hash))
            else:
                assert content is not None
                follows = is_there and before is not None and content.parent is before.content
                if not (follows and isinstance(last, BlockStored)):
                    last = self._stored(content, change)
                    events.append(last)
                last.block_hashes.append(self.hash_of(content.block_hash))
                last.token_ids.extend(content.tokens)
                if last.extra_keys is not None:
                    last.extra_keys.append(_extra_keys(content))
            before = change
        return events

    def hash_of(self, full: bytes) -> BlockHash:
        return full if self._as_bytes else int.from_bytes(full[-8:], "big")

    def _stored(self, content: BlockContent, change: Change) -> BlockStored:
        """Without the block itself."""
        parent, window, adapter = content.parent, self._windows[change.group], content.key.adapter
        return BlockStored(
            block_hashes=[],
            parent_block_hash=None
            if isinstance(parent, CacheKey)
            else self.hash_of(parent.block_hash),
            token_ids=[],
            block_size=self._block_size,
            lora_id=None,
            medium=MEDIA[change.tier],
            lora_name=_name(adapter),
            extra_keys=None if content.key == _NO_KEY else [],
            group_idx=change.group,
            kv_cache_spec_kind="full_attention" if window is None else "sliding_window",
            kv_cache_spec_sliding_window=window,
        )


_NO_KEY = CacheKey()


def _name(adapter: str | None) -> str | None:
    """Of an adapter's version, NAME@HASH."""
    return None if adapter is None else adapter.rpartition("@")[0] or adapter


def _extra_keys(content: BlockContent) -> list[str] | None:
    begins = isinstance(content.parent, CacheKey)
    keys = (_name(content.key.adapter), content.key.salt if begins else None)
    return [key for key in keys if key is not None] or None


class KVEventPublisher:
    """Publishes batches of changes in order, and answers requests for earlier ones.

    `publish` is called by the engine's loop and never waits: a batch that finds the queue full is dropped,
    and its sequence number with it. The thread encodes and sends. A subscriber that misses a number asks the
    replay socket for the batches from it on.
    """

    def __init__(
        self, config: KVEvents, writer: EventWriter, *, rank: int = 0, first: int = 0
    ) -> None:
        """first: the first sequence number. Raises `ConfigError` if an endpoint cannot be used."""
        config = config.of_rank(rank)
        self.num_dropped = 0
        self._config, self._writer, self._rank = config, writer, rank
        self._next = first
        self._queue: deque[tuple[int, float, Sequence[Change]]] = deque()
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._topic = config.topic.encode()
        self._encode = msgspec.msgpack.Encoder().encode
        self._context = zmq.Context()
        self._wake, self._woken = (self._socket(zmq.PAIR) for _ in range(2))
        self._replay: zmq.Socket[bytes] | None = None
        self.replay_endpoint: str | None = None
        try:
            self._woken.bind("inproc://wake")
            self._wake.connect("inproc://wake")
            assert config.endpoint is not None
            self._pub = self._socket(zmq.PUB, config.hwm)
            self.endpoint = _open(self._pub, "endpoint", config.endpoint, bind=config.binds)
            if config.replay_endpoint is not None:
                # Twice what a replay has: a peer reports what it has read only now and then.
                self._replay = self._socket(zmq.ROUTER, 2 * (config.buffer_steps + 1))
                self.replay_endpoint = _open(
                    self._replay, "replay_endpoint", config.replay_endpoint, bind=True
                )
        except BaseException:
            self._context.destroy(linger=0)
            raise
        verb = "on" if config.binds else "to"
        logger.info("KV events are published %s %s", verb, self.endpoint)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def _socket(self, kind: int, hwm: int = 1000) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(hwm)
        socket.setsockopt(zmq.LINGER, 1000)
        return socket

    def publish(self, changes: Sequence[Change]) -> bool:
        """False if they were dropped."""
        sequence, self._next = self._next, self._next + 1
        if len(self._queue) >= self._config.max_queue_size:
            self.num_dropped += 1
            if self.num_dropped == 1:
                logger.warning("KV events are dropped: the publisher's queue is full")
            return False
        self._queue.append((sequence, time.time(), changes))
        self._notify()
        return True

    def _notify(self) -> None:
        with contextlib.suppress(zmq.Again):  # it is awake
            self._wake.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        """Publish what is queued, and end."""
        self._closed = True
        self._notify()
        self._thread.join(timeout=5)
        self._wake.close()
        self._context.term()

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        try:
            while not self._closed:
                poller.poll()
                with contextlib.suppress(zmq.Again):
                    while True:
                        self._woken.recv(zmq.NOBLOCK)
                self._send_queued()
                if self._replay is not None and int(self._replay.get(zmq.EVENTS)) & zmq.POLLIN:
                    self._send_again(self._replay)
            self._send_queued()
        except Exception:
            logger.exception("KV events are published no more")
        finally:
            for socket in (self._woken, self._pub, self._replay):
                if socket is not None:
                    socket.close()

    def _send_queued(self) -> None:
        while self._queue:
            sequence, seconds, changes = self._queue.popleft()
            batch = KVEventBatch(seconds, self._writer.write(changes), self._rank)
            payload = self._encode(batch)
            self._pub.send_multipart((self._topic, sequence.to_bytes(8, "big"), payload))
            self._buffer.append((sequence, payload))

    def _send_again(self, replay: zmq.Socket[bytes]) -> None:
        """Answer one request: what is kept from a sequence number on, and an end mark."""
        client, *request = replay.recv_multipart()
        if len(request) != 2 or request[0] or len(request[1]) != 8:
            logger.warning("a malformed request for a replay of KV events is ignored")
            return
        start = int.from_bytes(request[1], "big")
        for sequence, payload in self._buffer:
            if sequence >= start:
                number = sequence.to_bytes(8, "big")
                replay.send_multipart((client, b"", self._topic, number, payload))
        replay.send_multipart((client, b"", b"", END_OF_REPLAY, b""))


def _open(socket: zmq.Socket[bytes], key: str, endpoint: str, *, bind: bool) -> str:
    """Returns the endpoint, with the port that the system chose for 0."""
    if "[" in endpoint or "::" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        (socket.bind if bind else socket.connect)(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"kv_events_config {key} {endpoint!r} cannot be used: {error}. Choose another address or port."
        ) from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT) if bind else endpoint


class KVEventStream:
    """The changes of a cache, published, and those of its tiers."""

    def __init__(
        self,
        config: KVEvents,
        kv: KVCacheManager,
        transfers: Transfers | None = None,
        *,
        rank: int = 0,
        restarts: int = 0,
    ) -> None:
        """restarts: how often the engine core was started again. Then subscribers know blocks that are gone:
        the first event is "all cleared", and its number is far above all before it, so that who misses it
        asks for a replay."""
        as_bytes = config.block_hashes == "bytes"
        writer = EventWriter(kv.block_size, kv.windows, as_bytes=as_bytes)
        first = restarts * NUMBERS_OF_A_CORE
        self.publisher = KVEventPublisher(config, writer, rank=rank, first=first)
        in_tiers = tuple if transfers is None else TierChanges(kv.pool, transfers.changes).take
        self._log = ChangeLog(kv.block_size, self.publisher.publish, kv.pool.cached, in_tiers)
        kv.pool.observers += (self._log,)
        self.flush, self.close = self._log.flush, self.publisher.close
        if restarts:
            self._log.cleared(())
            self.flush(())
