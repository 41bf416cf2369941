from __future__ import annotations

from collections.abc import Sequence

import pytest

from quire.config import from_flat
from quire.kvcache import KVConnector
from quire.kvtransfer.connector import StoreConnector
from quire.kvtransfer.create import create_connector, named
from quire.messages import BlockName, KVSource, TierStats
from tests.kvtransfer.test_ram import name

EXCHANGE = {"kv_connector": "TCPConnector", "kv_role": "kv_both", "kv_port": 2000}


class OneStore:
    def __init__(self, *numbers: int) -> None:
        self.names = {name(number) for number in numbers}
        self.has_room = True
        self.saved = 0

    def has(self, which: BlockName) -> bool:
        return which in self.names

    def wants(self, which: BlockName) -> bool:
        return which not in self.names

    def seconds(self, num_blocks: int, *, from_peer: bool) -> float:
        return num_blocks * (2.0 if from_peer else 1.0)

    def issue(self, names: Sequence[BlockName]) -> str | None:
        return f"for {len(names)}" if self.has_room else None

    def totals(self) -> dict[str, TierStats]:
        return {"ram": TierStats(blocks=len(self.names), saved_blocks=self.saved, is_off=True)}


def over(
    store: OneStore | None, policy: str | None = "write_back", *, fetches: bool = False
) -> KVConnector:
    return StoreConnector(lambda: store, block_size=16, policy=policy, fetches=fetches)


def names(numbers: Sequence[int]) -> list[BlockName]:
    return [name(number) for number in numbers]


def source(num_tokens: int) -> KVSource:
    return KVSource(engine_id="p", host="h", ports=(1,), ticket="t", num_tokens=num_tokens)


def test_leading_names_are_found() -> None:
    connector = over(OneStore(1, 2, 4))
    assert connector.lookup(names([1, 2, 3, 4])) == 2
    assert connector.lookup(names([3, 4])) == 0
    assert connector.lookup([]) == 0
    assert over(None).lookup(names([1])) == 0


def test_another_instance_has_whole_blocks_of_its_tokens_and_the_store_may_go_on() -> None:
    connector = over(OneStore(3, 4), fetches=True)
    every = names([1, 2, 3, 4, 5])
    assert connector.lookup(every, source(47)) == 4
    assert connector.lookup(every, source(31)) == 1
    assert connector.lookup(every[2:], source(48), start=2) == 2
    assert connector.lookup(every[4:], source(48), start=4) == 0
    assert connector.lookup(every, source(10**6)) == 5
    # an instance that reads from nobody ignores it
    assert over(OneStore(), fetches=False).lookup(every, source(48)) == 0
    assert over(None, fetches=True).lookup(every, source(48)) == 3


@pytest.mark.parametrize(
    ("policy", "evicted", "by_hits"),
    [
        ("write_back", True, (False, False)),
        ("write_through", True, (True, True)),
        ("write_through_selective", False, (False, True)),
        (None, False, (False, False)),
    ],
)
def test_when_blocks_are_saved(
    policy: str | None, evicted: bool, by_hits: tuple[bool, bool]
) -> None:
    connector = over(OneStore(1), policy)
    assert connector.wants_evicted(name(2)) is evicted
    assert tuple(connector.wants_reused(name(2), hits) for hits in (0, 1)) == by_hits
    for asleep_or_there in (over(None, policy), connector):
        assert not asleep_or_there.wants_evicted(name(1))
        assert not asleep_or_there.wants_reused(name(1), 5)


def test_the_time_of_a_load_is_the_stores() -> None:
    assert over(OneStore()).seconds(3) == 3.0
    assert over(OneStore()).seconds(3, source(1)) == 6.0
    assert over(None).seconds(3) == 0.0


def test_nothing_is_made_unless_configured() -> None:
    assert create_connector(from_flat({}), lambda: None) is None
    assert over(OneStore()).hold(names([1]), 16) is None


def test_a_ticket_is_for_names_at_the_ports_of_all_ranks() -> None:
    config = named(from_flat({"kv_transfer_config": EXCHANGE, "tensor_parallel_size": 2}))
    store: OneStore | None = OneStore()
    connector = create_connector(config, lambda: store)
    assert connector is not None
    held = connector.hold(names([1, 2]), 32)
    assert held is not None
    assert (held.host, held.ports) == ("127.0.0.1", (2000, 2001))
    assert (held.ticket, held.num_tokens) == ("for 2", 32)
    assert held.engine_id == config.kv_transfer.transfer.engine_id  # type: ignore[union-attr]
    assert not connector.wants_evicted(name(2))  # there are no tiers
    store.has_room = False
    assert connector.hold(names([1, 2]), 32) is None
    store = None
    assert connector.hold(names([1, 2]), 32) is None


def test_one_that_only_reads_holds_nothing() -> None:
    peers = {"kv_connector_extra_config": {"peers": ["h:1"]}}
    config = {**EXCHANGE, "kv_role": "kv_consumer", **peers}
    reader = create_connector(named(from_flat({"kv_transfer_config": config})), OneStore)
    assert reader is not None and reader.hold(names([1]), 16) is None
    assert reader.lookup(names([1]), source(16)) == 1


def test_counts_are_since_the_last_report_and_begin_again_with_a_new_store() -> None:
    store: OneStore | None = OneStore(1, 2)
    connector = StoreConnector(lambda: store, block_size=16, policy=None)
    store.saved = 5
    assert connector.stats() == {"ram": TierStats(blocks=2, saved_blocks=5, is_off=True)}
    store.saved = 7
    assert connector.stats()["ram"].saved_blocks == 2
    assert connector.stats()["ram"].saved_blocks == 0
    store = None
    assert connector.stats() == {}
    store = OneStore()
    store.saved = 3
    assert connector.stats()["ram"].saved_blocks == 3


def test_an_instance_has_a_name_of_its_own_that_all_its_ranks_are_told() -> None:
    config = from_flat({"kv_transfer_config": EXCHANGE})
    first, second = (named(config).kv_transfer.transfer for _ in range(2))
    assert first is not None and second is not None and first.engine_id != second.engine_id
    assert named(named(config)).kv_transfer.transfer is not None
    once = named(config)
    assert named(once) is once
    given = from_flat({"kv_transfer_config": {**EXCHANGE, "engine_id": "mine"}})
    assert named(given) is given
    assert named(from_flat({})) == from_flat({})
