"""Whatever a network does to the messages between two instances: fewer blocks at most, and in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quire.kvtransfer import wire
from quire.kvtransfer.peer_client import PeerClient
from quire.kvtransfer.share import KVShare
from quire.messages import KVSource
from tests.kvtransfer.fault_proxy import TO_CLIENT, TO_SERVER, Fault, FaultProxy, proxied
from tests.kvtransfer.instances import FINGERPRINT, KEY, SECONDS, Instances, content, names

SHARE = KVShare(((0,),), (0, 2), 8)
TIMEOUT = 0.25
LATE = 5.0
"""A fetch that takes so long does not end in time."""


class Pair:
    """One instance that holds four blocks, in two frames, and one that asks through a proxy."""

    def __init__(self, path: Path) -> None:
        self.both = Instances(path, holders=[SHARE], readers=[SHARE], lease=600.0)
        self.wanted = names(4, groups=1)
        self.right = content(SHARE, self.wanted)
        self.source = self.both.held(self.wanted)

    def fetch(self, proxy: FaultProxy, timeout: float = TIMEOUT) -> int:
        """By a new client, so that the fault may be in the hello."""
        client = PeerClient(
            allowed=lambda host, ports: True,
            key=KEY,
            engine_id="D",
            rank=0,
            ranks=1,
            share=SHARE,
            fingerprint=FINGERPRINT,
        )
        out = np.full((4, SHARE.block_bytes), 0xEE, np.uint8)
        source = KVSource(
            engine_id="P",
            host="127.0.0.1",
            ports=(proxy.port,),
            ticket=self.source.ticket,
            num_tokens=64,
        )
        began = time.monotonic()
        good = client.fetch(source, self.wanted, out, timeout)
        took = time.monotonic() - began
        client.close()
        assert (out[:good] == self.right[:good]).all()
        assert (out[good:] == 0xEE).all()
        assert took < timeout + LATE
        return good


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(wire, "FRAME_BYTES", 2 * SHARE.block_bytes)
    made = Pair(tmp_path)
    with made.both:
        yield made
        for holder in made.both.holders:  # still serves others
            assert holder.exports is not None and len(holder.exports) == 1
        with proxied(made.both.holders[0].port or 0) as proxy:
            assert made.fetch(proxy, SECONDS) == 4


@pytest.mark.parametrize("kind", ["flip", "cut"])
@pytest.mark.parametrize("direction", [TO_CLIENT, TO_SERVER])
def test_an_altered_byte_or_an_end_costs_blocks_only(pair: Pair, kind: str, direction: str) -> None:
    port = pair.both.holders[0].port or 0
    with proxied(port) as proxy:
        assert pair.fetch(proxy, SECONDS) == 4
        size = proxy.counts[direction]
    found = set()
    for at in range(size):
        with proxied(port, Fault(direction, kind, at)) as proxy:
            found.add(pair.fetch(proxy))
    # After a cut it connects again, and gets the next frame.
    most = {0} if direction == TO_SERVER else {0, 2} if kind == "flip" else {0, 2, 4}
    assert found <= most
    assert direction == TO_SERVER or len(found) > 1


@pytest.mark.parametrize("kind", ["drop", "repeat", "swap", "grow", "shrink"])
@pytest.mark.parametrize("direction", [TO_CLIENT, TO_SERVER])
def test_messages_out_of_order_cost_blocks_only(pair: Pair, kind: str, direction: str) -> None:
    port = pair.both.holders[0].port or 0
    for at in range(5 if direction == TO_CLIENT else 2):
        with proxied(port, Fault(direction, kind, at)) as proxy:
            good = pair.fetch(proxy)
        if kind == "repeat":
            most = {(TO_CLIENT, 3): 2, (TO_CLIENT, 4): 4, (TO_SERVER, 1): 4}.get((direction, at), 0)
        else:
            most = 2 if at == 4 else 0
        assert good in {0, 2, most} and good <= most


def test_a_network_that_stalls_costs_the_timeout(pair: Pair) -> None:
    port = pair.both.holders[0].port or 0
    for direction in (TO_CLIENT, TO_SERVER):
        with proxied(port) as proxy:
            assert pair.fetch(proxy, SECONDS) == 4
            size = proxy.counts[direction]
        for at in range(0, size, size // 8):
            with proxied(port, Fault(direction, "stall", at)) as proxy:
                assert pair.fetch(proxy) in (0, 2)
        with proxied(port, Fault(direction, "stall", size // 2)) as proxy:
            assert pair.fetch(proxy, SECONDS) == 4
