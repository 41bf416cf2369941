"""The router against a model of it that keeps whole prefixes, and the cases of its rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.router import Router, RoutingRule

RULE = RoutingRule()
ENDS = [*range(16, 257, 16), *range(320, 2000, 64)]
"""Where the chunks of a prompt end."""

Prefix = tuple[object, ...]


@dataclass
class Model:
    """One replica: its prefixes in the order of their use, and its live requests."""

    capacity: int
    prefixes: dict[Prefix, int] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)

    def known(self, namespace: object, tokens: list[int]) -> int:
        whole = [end for end in ENDS if (namespace, *tokens[:end]) in self.prefixes]
        return max((end for end in whole if end <= len(tokens)), default=0)

    def learn(self, namespace: object, tokens: list[int]) -> None:
        ends = [end for end in ENDS if end <= len(tokens)]
        for end in reversed(ends):
            self.prefixes.pop((namespace, *tokens[:end]), None)
            self.prefixes[namespace, *tokens[:end]] = 16 if end <= 256 else 64
        while sum(self.prefixes.values()) > self.capacity:
            del self.prefixes[next(iter(self.prefixes))]

    @property
    def load(self) -> int:
        return sum(self.loads.values())


def allowed(
    models: list[Model], namespace: object, tokens: list[int], among: list[int]
) -> list[int]:
    """The replicas that the rule allows."""
    costs = {}
    for index in among:
        model = models[index]
        known = model.known(namespace, tokens)
        counts = known if known >= RULE.min_share * len(tokens) else 0
        costs[index] = model.load - RULE.prefix_weight * counts
    return [index for index in among if costs[index] == min(costs.values())]


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("request"),
            st.sampled_from([None, "a", "b"]),
            st.lists(st.sampled_from([0, 0, 0, 1, 2]), max_size=30),
            st.integers(0, 15),
        ),
        st.tuples(st.sampled_from(["computed", "end"]), st.integers(0, 30)),
        st.tuples(st.sampled_from(["remove", "forget"]), st.integers(0, 3)),
    ),
    max_size=40,
)


@given(st.lists(st.integers(0, 800), min_size=1, max_size=3), steps)
@settings(max_examples=300, deadline=None)
def test_it_chooses_as_a_model_that_keeps_everything(
    capacities: list[int], script: list[Any]
) -> None:
    router: Router[int] = Router(RULE)
    models = [Model(capacity) for capacity in capacities]
    among = list(range(len(models)))
    for index, model in enumerate(models):
        router.add(index, cache_tokens=model.capacity)
    sent: dict[int, int] = {}
    rows: dict[int, int] = {}
    for number, step in enumerate(script):
        if step[0] == "request":
            _, salt, words, more = step
            tokens = [word for word in words for _ in range(16)] + [9] * more
            may = allowed(models, salt, tokens, among)
            chosen = router.choose(number, tokens, salt=salt)
            assert chosen in may
            model = models[chosen]
            missing = len(tokens) - model.known(salt, tokens)
            model.learn(salt, tokens)
            rows[number] = RULE.row_tokens + int(len(tokens) * RULE.row_share)
            model.loads[number] = missing + rows[number]
            sent[number] = chosen
        elif step[0] in ("computed", "end"):
            getattr(router, step[0])(step[1])
            if step[1] in sent:
                loads = models[sent[step[1]]].loads
                if step[0] == "end":
                    loads.pop(step[1], None)
                elif step[1] in loads:
                    loads[step[1]] = rows[step[1]]
        elif step[0] == "forget":
            router.forget()
            for model in models:
                model.prefixes.clear()
        elif len(among) > 1 and step[1] in among:
            router.remove(step[1])
            among.remove(step[1])
        for index in among:
            assert router.load(index) == models[index].load


def missing(router: Router[int], tokens: list[int]) -> int:
    """Tokens of a prompt that the only replica does not know. It knows them then."""
    router.choose(0, tokens)
    missing = router.missing(0)
    router.end(0)
    return missing


def test_the_least_recently_used_is_forgotten_and_of_a_prompt_the_end_first() -> None:
    router: Router[int] = Router(RULE)
    router.add(0, cache_tokens=64)
    first, second, third = ([token] * 32 for token in (1, 2, 3))
    assert [missing(router, tokens) for tokens in (first, second, first, third)] == [32, 32, 0, 32]
    assert missing(router, first) == 0, "it was used after the second"
    assert missing(router, second) == 32
    assert missing(router, [4] * 96) == 96
    assert missing(router, [4] * 64) == 0, "the end of it was forgotten, the beginning kept"


def test_equals_are_chosen_in_turn() -> None:
    router: Router[str] = Router()
    for name in "abc":
        router.add(name, cache_tokens=1000)
    chosen = []
    for number in range(6):
        chosen.append(router.choose(number, [number] * 8))
        router.end(number)
    assert sorted(chosen) == sorted("aabbcc") and chosen[:3] == chosen[3:]


def test_a_short_common_beginning_does_not_decide() -> None:
    router: Router[int] = Router()
    for name in range(2):
        router.add(name, cache_tokens=10_000)
    system = list(range(32))
    first = router.choose(1, [*system, *range(100, 400)])
    assert router.choose(2, [*system, *range(500, 800)]) != first
    assert router.choose(3, [*system, *range(100, 400)]) == first


def test_adapters_and_salts_are_namespaces() -> None:
    router: Router[int] = Router()
    for name in range(2):
        router.add(name, cache_tokens=10_000)
    tokens = list(range(320))
    first = router.choose(1, tokens, salt="x")
    assert router.choose(2, tokens, salt="y") != first
    assert router.choose(3, tokens, salt="x", adapter="z") in (0, 1)
    assert router.choose(4, tokens, salt="x") == first


def test_an_adapter_stays_where_it_is_in_memory() -> None:
    router: Router[int] = Router()
    for name in range(2):
        router.add(name, cache_tokens=10_000, max_adapters=1)
    home = router.choose(1, [1] * 20, adapter="x")
    for number in range(2, 6):
        assert router.choose(number, [number] * 20, adapter="x") == home
    assert router.choose(7, [7] * 20, adapter="y") != home
    router.choose(8, [8] * 20, among=[home], adapter="y")  # takes the place of x
    assert router.choose(9, [9] * 20, adapter="x") != home


def test_an_adapter_is_loaded_elsewhere_once_its_replica_has_too_much_to_do() -> None:
    router: Router[int] = Router(RoutingRule(adapter_tokens=500))
    for name in range(2):
        router.add(name, cache_tokens=10_000)
    home = router.choose(1, [1] * 300, adapter="x")
    assert router.choose(2, [2] * 300, adapter="x") == home, (
        "364 tokens of load, and loading takes 500"
    )
    assert router.choose(3, [3] * 300, adapter="x") != home


def test_a_burst_of_one_prompt_is_spread() -> None:
    router: Router[int] = Router()
    for name in range(2):
        router.add(name, cache_tokens=100_000)
    tokens = list(range(2000))
    chosen = [router.choose(number, tokens) for number in range(200)]
    assert {chosen.count(0), chosen.count(1)} != {200, 0}
    assert abs(chosen.count(0) - chosen.count(1)) < 100


@pytest.mark.parametrize("length", [1_000, 10_000, 100_000])
def test_a_long_prefix_is_worth_as_much_of_its_prompt_as_a_short_one(length: int) -> None:
    """While another prompt of the same length is under way where the prefix is."""
    router: Router[int] = Router()
    for name in range(2):
        router.add(name, cache_tokens=10 * length)
    talk = [1] * length
    home = router.choose(1, talk)
    router.end(1)
    router.choose(2, [2] * length, among=[home])
    assert router.choose(3, [*talk, *[3] * (length // 10)]) == home
    router.choose(4, [4] * length, among=[home])
    router.choose(5, [5] * length, among=[home])
    assert router.choose(6, [*talk, *[6] * (length // 10)]) != home, (
        "three prompts are waiting there"
    )


@pytest.mark.parametrize("length", [500, 5_000, 50_000])
def test_a_prefix_that_all_share_comes_to_every_replica_and_is_computed_once_in_each(
    length: int,
) -> None:
    """Each request is served in turn; as many are under way as fill four replicas."""
    router: Router[int] = Router()
    for name in range(4):
        router.add(name, cache_tokens=100 * length)
    hot, own, under_way = [1] * length, length // 10, 400
    chosen, computed = [], 0
    for number in range(2000):
        chosen.append(router.choose(number, [*hot, *[number + 2] * own]))
        computed += router.missing(number)
        router.computed(number - 8)
        router.end(number - under_way)
    late = chosen[under_way:]
    assert max(map(late.count, range(4))) < 1.2 * len(late) / 4
    assert computed < 2000 * (own + 64) + 5 * length
