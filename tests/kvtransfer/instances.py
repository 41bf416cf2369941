"""Instances that hold and fetch KV, with blocks whose bytes are known."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quire.config import KVTransfer
from quire.kvtransfer.peering import Peering, create_peering
from quire.kvtransfer.share import KVShare
from quire.messages import BlockName, KVSource

KEY = b"0123456789abcdef0123"
FINGERPRINT = b"f1"
TCP = "TCPConnector"
UNIX = "SharedMemoryConnector"
SECONDS = 20.0
"""Enough for all that should come."""

NUM_HEADS = 4
GROUPS = ((0, 2, 4), (1, 3))
"""The second group's blocks have an unused part."""
HEAD_BYTES = 24


class Filled:
    """A snapshot that is complete."""

    def wait(self) -> None:
        pass


def divided(
    heads: int = 1, stages: int = 1, groups: Sequence[Sequence[int]] = GROUPS
) -> list[KVShare]:
    """The shares of `heads` ranks in each of `stages` stages, in the order of the ranks."""
    layers = sorted(layer for group in groups for layer in group)
    shares = []
    for stage in range(stages):
        own = layers[stage * len(layers) // stages : (stage + 1) * len(layers) // stages]
        of_groups = tuple(tuple(i for i in group if i in own) for group in groups)
        for rank in range(heads):
            if heads > NUM_HEADS:
                first = rank * NUM_HEADS // heads
                run = first, first + 1
            else:
                run = rank * NUM_HEADS // heads, (rank + 1) * NUM_HEADS // heads
            shares.append(KVShare(of_groups, run, HEAD_BYTES))
    return shares


def names(count: int, seed: int = 0, groups: int = len(GROUPS)) -> list[BlockName]:
    return [
        (hashlib.sha256(b"%d %d" % (seed, index)).digest(), group)
        for index in range(count)
        for group in range(groups)
    ]


def content(share: KVShare, wanted: Sequence[BlockName]) -> NDArray[np.uint8]:
    """The KV of these blocks in a share; zeros where a block has nothing."""
    out = np.zeros((len(wanted), share.block_bytes), np.uint8)
    for row, (name, group) in enumerate(wanted):
        pieces = [
            hashlib.shake_128(b"%d %d %d " % (layer, half, head) + name).digest(share.head_bytes)
            for layer in share.layers[group]
            for half in range(2)
            for head in range(*share.heads)
        ]
        data = np.frombuffer(b"".join(pieces), np.uint8)
        out[row, : len(data)] = data
    return out


class Instances:
    """One that holds KV and one that fetches it, with any division among ranks."""

    def __init__(
        self,
        path: Path,
        connector: str = TCP,
        *,
        holders: Sequence[KVShare] | None = None,
        readers: Sequence[KVShare] | None = None,
        key: bytes = KEY,
        reader_key: bytes | None = None,
        reader_fingerprint: bytes = FINGERPRINT,
        peers: tuple[str, ...] | None = None,
        max_bytes: int = 1 << 24,
        lease: float = 30.0,
        host: str = "",
    ) -> None:
        self.holder_shares, self.reader_shares = holders or divided(), readers or divided()
        self._stack = ExitStack()

        self.host = host or (f"unix:{path / 'kv'}" if connector == UNIX else "127.0.0.1")

        def start(
            engine_id: str, role: str, shares: Sequence[KVShare], key: bytes, fingerprint: bytes
        ) -> list[Peering]:
            transfer = KVTransfer(
                kv_connector=connector,
                kv_role=role,
                kv_ip=self.host,
                kv_port=0,
                kv_buffer_size=max_bytes,
                peers=(self.host,) if peers is None else peers,
                lease_seconds=lease,
            )
            made = []
            for rank, share in enumerate(shares):
                one = create_peering(
                    transfer,
                    share,
                    fingerprint,
                    key=key,
                    engine_id=engine_id,
                    rank=rank,
                    ranks=len(shares),
                )
                self._stack.callback(one.close)
                made.append(one)
            return made

        self.holders = start("P", "kv_producer", self.holder_shares, key, FINGERPRINT)
        self.readers = start(
            "D",
            "kv_consumer",
            self.reader_shares,
            key if reader_key is None else reader_key,
            reader_fingerprint,
        )

    def __enter__(self) -> Instances:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def issue(self, wanted: Sequence[BlockName]) -> str:
        exports = self.holders[0].exports
        assert exports is not None
        ticket = exports.issue(wanted)
        assert ticket is not None
        return ticket

    def save(self, ticket: str, wanted: Sequence[BlockName]) -> None:
        """As every rank does it for a `Save`."""
        for holder, share in zip(self.holders, self.holder_shares, strict=True):
            assert holder.exports is not None
            rows = holder.exports.reserve(ticket, wanted)
            if rows is not None:
                for row, data in zip(rows, content(share, wanted), strict=True):
                    row[:] = data
                holder.exports.ready(ticket, Filled())

    def source(self, ticket: str, **changed: object) -> KVSource:
        fields = {
            "engine_id": "P",
            "host": self.host,
            "ports": tuple(holder.port for holder in self.holders),
            "ticket": ticket,
            "num_tokens": 16,
        }
        return KVSource(**(fields | changed))  # type: ignore[arg-type]

    def held(self, wanted: Sequence[BlockName]) -> KVSource:
        ticket = self.issue(wanted)
        self.save(ticket, wanted)
        return self.source(ticket)

    def fetch(
        self,
        source: KVSource,
        wanted: Sequence[BlockName],
        *,
        rank: int = 0,
        timeout: float = SECONDS,
    ) -> int:
        """The number of good blocks, whose bytes are right."""
        share, peers = self.reader_shares[rank], self.readers[rank].peers
        assert peers is not None
        out = np.full((len(wanted), share.block_bytes), 0xEE, np.uint8)
        good = peers.fetch(source, wanted, out, timeout)
        right = content(share, wanted)
        for row in range(good):
            used = share.part_bytes * len(share.layers[wanted[row][1]])
            assert bytes(out[row, :used]) == bytes(right[row, :used]), f"block {row} of {good}"
        return good

    @property
    def num_held(self) -> int:
        return sum(len(holder.exports) for holder in self.holders if holder.exports is not None)


def comes_true(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
