"""What clients asked to keep is evicted last: within a cap, for a time, and shared fairly."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.kvcache import CacheKey, KVCacheManager
from quire.kvcache.retention import Retention
from quire.placement import Placement, Retain

BS = 4
PLAIN = CacheKey()


class Cache:
    """A cache, its clock, and requests that run one after the other."""

    def __init__(self, num_blocks: int, *, share: float = 0.5, windows=(None,)) -> None:
        self.now, self.next_id = 0.0, 0
        self.kv = KVCacheManager(
            1 + num_blocks, BS, enable_prefix_caching=True, windows=windows, max_row_tokens=80,
            retention=Retention.of_blocks(num_blocks, share, len(windows), lambda: self.now),
        )  # fmt: skip

    def run(self, tokens: list[int], *retain: Retain, tenant: str = "default") -> int:
        """Returns how many tokens were found."""
        self.next_id += 1
        match = self.kv.match_prefix(self.next_id, tokens, PLAIN, self.next_id)
        self.kv.admit(self.next_id, match, PLAIN, len(tokens))
        self.kv.register(self.next_id, tokens, len(tokens), self.next_id)
        placement = Placement(tenant=tenant, retain=retain)
        self.kv.release(self.next_id, placement=placement)
        self.kv.forget(self.next_id)
        self.kv.check_invariants()
        return match.num_tokens

    def flood(self, num_blocks: int) -> None:
        """Other traffic, that takes so many blocks."""
        for _ in range(num_blocks):
            self.next_id += 1
            self.run([10**6 + self.next_id] * BS)

    def found(self, tokens: list[int]) -> int:
        self.next_id += 1
        match = self.kv.match_prefix(self.next_id, [*tokens, 0], PLAIN, self.next_id)
        self.kv.forget(self.next_id)
        return match.num_tokens


PROMPT = list(range(1, 21))


def test_what_is_retained_survives_a_flood() -> None:
    cache = Cache(20)
    cache.run(PROMPT, Retain(60.0))
    cache.run([99] * 20)
    cache.flood(60)
    assert (cache.found(PROMPT), cache.found([99] * 20)) == (20, 0)


def test_it_is_a_priority_and_not_a_reservation() -> None:
    cache = Cache(20)
    cache.run(PROMPT, Retain(60.0))
    cache.run([7] * 80)  # takes every block
    assert cache.found(PROMPT) == 0
    assert len(cache.kv.pool.retention) == 0


def test_of_a_retained_prompt_the_head_goes_last() -> None:
    cache = Cache(20)
    cache.run(PROMPT, Retain(60.0))
    cache.run([7] * 68)  # all but three
    assert cache.found(PROMPT) == 12


def test_without_a_use_it_expires() -> None:
    cache = Cache(20)
    cache.run(PROMPT, Retain(60.0))
    cache.run([8] * 8, Retain(3600.0))
    cache.now = 59.0
    cache.run(PROMPT[:12])  # a use, which asks for nothing
    cache.now = 60.0  # the rest is over
    cache.flood(60)
    assert (cache.found(PROMPT), cache.found([8] * 8)) == (12, 8)
    cache.now = 118.0
    cache.flood(60)
    assert cache.found(PROMPT) == 12
    cache.now = 119.0
    cache.flood(60)
    assert (cache.found(PROMPT), cache.found([8] * 8)) == (0, 8)


def test_only_the_first_tokens_where_the_wish_says_so() -> None:
    cache = Cache(20)
    cache.run(PROMPT, Retain(60.0, 13), Retain(3600.0, 4))
    cache.flood(40)
    assert cache.found(PROMPT) == 12
    cache.now = 60.0
    cache.flood(40)
    assert cache.found(PROMPT) == 4


def test_a_shorter_wish_does_not_shorten_a_longer_one() -> None:
    cache = Cache(20)
    cache.run(PROMPT, Retain(3600.0))
    cache.run(PROMPT, Retain(60.0))
    cache.now = 100.0
    cache.flood(40)
    assert cache.found(PROMPT) == 20


def test_beyond_the_cap_the_oldest_falls_back() -> None:
    cache = Cache(20, share=0.5)
    prompts = [[number] * 16 for number in (1, 2, 3)]
    for prompt in prompts:
        cache.run(prompt, Retain(60.0))
    assert len(cache.kv.pool.retention) == 10
    cache.flood(40)
    assert [cache.found(prompt) for prompt in prompts] == [8, 16, 16]


def test_a_tenant_who_retains_everything_leaves_another_its_share() -> None:
    cache = Cache(40, share=0.5)
    cache.run([1] * 20, Retain(60.0), tenant="small")
    for number in range(2, 12):
        cache.run([number] * 16, Retain(3600.0), tenant="large")
    cache.run([50] * 20, Retain(60.0), tenant="late")
    cache.flood(80)
    assert cache.found([1] * 20) == 20 and cache.found([50] * 20) == 20
    assert sum(cache.found([number] * 16) for number in range(2, 12)) == 40


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_without_a_share_nothing_is_retained(share: float) -> None:
    cache = Cache(20, share=share)
    cache.run(PROMPT, Retain(60.0))
    cache.flood(40)
    assert cache.found(PROMPT) == 0


def test_a_reset_drops_what_is_retained() -> None:
    cache = Cache(20)
    cache.run(PROMPT, Retain(60.0))
    cache.kv.reset_cache()
    cache.kv.check_invariants()
    assert (cache.found(PROMPT), len(cache.kv.pool.retention)) == (0, 0)


def test_a_hold_that_is_renewed_takes_no_more_memory() -> None:
    cache = Cache(20)
    for step in range(2000):
        cache.now = float(step)
        cache.run(PROMPT, Retain(3600.0), tenant=str(step % 3))
    assert len(cache.kv.pool.retention._due) < 200


class RetentionMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 30),
        share=st.sampled_from([0.0, 0.3, 1.0]),
        windows=st.sampled_from([(None,), (None, 6), (6,)]),
    )
    def set_up(self, num_blocks, share, windows):
        self.cache = Cache(num_blocks, share=share, windows=windows)
        self.running: dict[int, tuple[list[int], Placement]] = {}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        tenant=st.sampled_from("abc"),
        retain=st.lists(
            st.builds(
                Retain, st.sampled_from([5.0, 50.0]), st.sampled_from([None, 0, 4, 11, 10**6])
            ),
            max_size=2,
        ),
    )
    def start(self, tokens, tenant, retain):
        cache, kv = self.cache, self.cache.kv
        cache.next_id += 1
        match = kv.match_prefix(cache.next_id, tokens, PLAIN, cache.next_id)
        if kv.blocks_needed(match, len(tokens)) <= kv.num_free:
            kv.admit(cache.next_id, match, PLAIN, len(tokens))
            kv.register(cache.next_id, tokens, len(tokens), cache.next_id)
            placement = Placement(tenant=tenant, retain=tuple(retain))
            self.running[cache.next_id] = (tokens, placement)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        tokens, placement = self.running.pop(request_id)
        kv = self.cache.kv
        kv.slide(request_id, len(tokens))
        kv.release(request_id, tokens, step_id=request_id, placement=placement)
        kv.forget(request_id)

    @rule(seconds=st.sampled_from([1.0, 10.0, 100.0]))
    def wait(self, seconds):
        self.cache.now += seconds

    @rule()
    def reset(self):
        self.cache.kv.reset_cache()

    @invariant()
    def consistent(self):
        if hasattr(self, "cache"):
            self.cache.kv.check_invariants()


TestRetention = RetentionMachine.TestCase
TestRetention.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
