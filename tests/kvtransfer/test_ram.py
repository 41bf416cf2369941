from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kvtransfer.codec import HEADER, Codec, find_compressor
from quire.kvtransfer.ram import ENTRY_BYTES, RamTier
from quire.messages import BlockName
from tests.kvtransfer.test_codec import kv, noise

SIZE = 512
STORED = SIZE + HEADER.size + ENTRY_BYTES
"""What a block of noise takes."""


def name(number: int, group: int = 0) -> BlockName:
    return number.to_bytes(32, "big"), group


def tier_for(blocks: int) -> RamTier:
    return RamTier(blocks * STORED, Codec(2, find_compressor()))


def block(number: int) -> np.ndarray:
    return noise(SIZE, number)


def read(tier: RamTier, which: BlockName) -> np.ndarray | None:
    out = np.empty(SIZE, np.uint8)
    return out if tier.get(which, out) else None


def test_what_was_put_comes_back_under_its_name_only() -> None:
    tier = tier_for(4)
    data = block(1)
    assert tier.put(name(1), data)
    kept, data[:] = data.copy(), 0  # a copy was kept
    assert np.array_equal(read(tier, name(1)), kept)
    assert tier.has(name(1)) and not tier.has(name(1, 1)) and not tier.has(name(2))
    assert read(tier, name(1, 1)) is None and read(tier, name(2)) is None


def test_the_first_goes_first_except_what_was_read() -> None:
    tier = tier_for(3)
    for number in (3, 2, 1):  # a prefix's blocks, as the cache evicts them
        assert tier.put(name(number), block(number))
    for number in (1, 2, 3):
        assert read(tier, name(number)) is not None
    for number in (10, 11):
        assert tier.put(name(number), block(number))
    # all were kept for another round, and in that the prefix's end went first
    assert [tier.has(name(n)) for n in (3, 2, 1, 10, 11)] == [False, False, True, True, True]
    assert len(tier) == 3
    assert tier.counts == {
        "saved_blocks": 5,
        "written_bytes": 5 * (STORED - ENTRY_BYTES),
        "loaded_blocks": 3,
        "read_bytes": 3 * (STORED - ENTRY_BYTES),
        "evicted_blocks": 2,
    }


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 3000),
    st.lists(st.tuples(st.sampled_from("pPgc"), st.integers(0, 12)), max_size=60),
)
def test_the_budget_holds_at_any_time(capacity: int, calls: list[tuple[str, int]]) -> None:
    tier = RamTier(capacity, Codec(2, find_compressor()))
    for call, number in calls:
        if call == "c":
            tier.clear()
        elif call == "g":
            found = read(tier, name(number))
            assert found is None or np.array_equal(found, block(number))
        else:  # of two sizes, as one compresses
            tier.put(
                name(number + 100 * (call == "P")),
                kv(256, number) if call == "P" else block(number),
            )
        held = sum(len(entry.record) + ENTRY_BYTES for entry in tier._entries.values())
        assert held == tier.num_bytes <= capacity


def test_a_block_larger_than_all_is_refused_and_drops_nothing() -> None:
    tier = tier_for(2)
    assert tier.put(name(1), block(1))
    assert not tier.put(name(2), noise(4 * SIZE))
    assert tier.has(name(1))


def test_a_damaged_entry_is_a_miss_and_is_forgotten() -> None:
    tier = tier_for(2)
    assert tier.put(name(1), block(1))
    entry = tier._entries[name(1)]
    entry.record = entry.record[:-1] + bytes([entry.record[-1] ^ 1])
    assert read(tier, name(1)) is None
    assert not tier.has(name(1)) and tier.num_bytes == 0
    assert tier.counts["damaged_blocks"] == 1 and tier.counts["loaded_blocks"] == 0


def test_what_was_begun_before_a_clear_is_not_kept_after_it() -> None:
    class Interrupted(Codec):
        during: Callable[[], None] = staticmethod(lambda: None)

        def encode(self, data: np.ndarray) -> bytes:
            self.during()
            return super().encode(data)

    codec = Interrupted(2, find_compressor())
    tier = RamTier(1 << 20, codec)
    codec.during = tier.clear
    assert not tier.put(name(1), block(1))
    assert not tier.has(name(1)) and tier.num_bytes == 0


def test_several_threads_read_and_write_whole_blocks() -> None:
    tier = tier_for(20)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        numbers = np.random.default_rng(seed).integers(0, 40, 300).tolist()
        try:
            for number in numbers:
                if number % 2:
                    assert tier.put(name(number), block(number))
                found = read(tier, name(number))
                assert found is None or np.array_equal(found, block(number))
                assert tier.num_bytes <= tier.capacity
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert tier.num_bytes == sum(len(e.record) + ENTRY_BYTES for e in tier._entries.values())
    tier.close()
    tier.close()
    assert len(tier) == 0
