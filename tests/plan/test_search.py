"""The cheapest layout, and why others are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quire.errors import ConfigError
from quire.plan.devices import find_gpu
from quire.plan.load import Lengths
from quire.plan.model import Layout, find_model, place
from quire.plan.search import (
    FORMATS,
    RANKS,
    Candidate,
    Wish,
    candidates,
    most_rows,
    parse_slo,
    replica_of,
)

OPTIONS = {"max_model_len": 8192}


def search(
    name: str,
    gpus: str,
    rate: float | None,
    slo: str,
    *,
    formats: tuple[str | None, ...] = FORMATS,
    context: int = 8192,
) -> list[Candidate]:
    wish = Wish(Lengths(1000, 200), rate, parse_slo(slo) if slo else {})
    return candidates(
        find_model(name),
        [find_gpu(gpu) for gpu in gpus.split()],
        formats,
        wish,
        {"max_model_len": context},
    )


def test_the_first_is_the_cheapest_of_all_that_meet_the_slo() -> None:
    found = search("qwen2.5-7b", "h100 rtx4090", 20.0, "ttft=500ms,itl=50ms")
    assert len(found) == 2 * len(RANKS) * len(FORMATS)
    met = [each for each in found if each.refused is None]
    assert [each.dollars for each in met] == sorted(each.dollars for each in met)
    for each in met:
        assert each.point is not None
        assert each.point.ttft_p99 <= 0.5
        assert each.point.itl_p99 <= 0.05
        assert each.point.rate * each.replicas == pytest.approx(20.0)
        assert each.most_rate * each.replicas >= 20.0
        assert each.replicas == 1 or each.most_rate * (each.replicas - 1) < 20.0, (
            "one less is too few"
        )


def test_each_refusal_is_true() -> None:
    found = search("llama-3.1-70b", "h100", 1.0, "ttft=90ms", formats=(None, "fp8"))
    reasons = {each.layout.label: each.refused for each in found}
    assert reasons["h100 tp 1, as it is"] == "weights and activations, 134.2 GiB, do not fit 79.6"
    assert "p99 of TTFT" in str(reasons["h100 tp 2, fp8"])
    for each in found:
        if each.refused and "TTFT" in each.refused:
            alone = replica_of(
                place(find_model("llama-3.1-70b"), each.layout, OPTIONS), Lengths(1000, 200)
            )
            assert alone.with_rows(0.01).ttft_p99 > 0.09
    heads = search("smollm2-135m", "h100", 1.0, "", formats=(None,))
    assert [each.refused for each in heads if each.layout.tensor_parallel == 8] == [
        "its heads cannot be divided among 8"
    ]
    (tight,) = [
        each
        for each in search("qwen2.5-72b", "h100", 1.0, "", formats=(None,), context=32768)
        if each.layout.tensor_parallel == 2
    ]
    assert tight.refused == "1.9 GiB are left for KV: not one sequence of 32,768 tokens"


def test_a_smaller_budget_is_taken_where_the_itl_needs_it() -> None:
    strict, loose = (
        next(
            each
            for each in search("llama-3.1-70b", "h100", 2.0, slo, formats=("fp8",))
            if each.layout.tensor_parallel == 2
        )
        for slo in ("itl=60ms", "itl=900ms")
    )
    assert strict.budget == 512
    assert loose.budget == 2048


def test_long_prompts_with_one_token_are_judged_at_little_load() -> None:
    """Fewer than 0.01 of them run in the mean, since nearly all their steps are the prompt's."""
    layout = Layout(find_gpu("h100"))
    lengths = Lengths(130_000, 1)
    replica = replica_of(
        place(find_model("llama-3.1-8b"), layout, {"max_model_len": 131_072}), lengths
    )
    replica = replace(replica, budget=1024)
    assert replica.most_rows < 0.01
    alone = replica.with_rows(1e-9).ttft_p99
    assert most_rows(replica, Wish(lengths, None, {"ttft": 2 * alone})) is not None
    assert most_rows(replica, Wish(lengths, None, {"ttft": 0.9 * alone})) is None


def test_without_a_rate_the_cheapest_request_is_first() -> None:
    found = [
        each
        for each in search("qwen2.5-1.5b", "h100 l40s", None, "itl=50ms", formats=(None,))
        if each.refused is None
    ]
    prices = [each.request_dollars for each in found]
    assert prices == sorted(prices)
    assert {each.replicas for each in found} == {1}


def test_slos() -> None:
    assert parse_slo("ttft=500ms, itl=0.05s,tpot=40ms") == {"ttft": 0.5, "itl": 0.05, "tpot": 0.04}
    for text in (
        "ttft",
        "ttft=5",
        "ttft=xs",
        "e2e=5s",
        "ttft=1s,ttft=2s",
        "ttft=-1ms",
        "ttft=infs",
        "",
    ):
        with pytest.raises(ConfigError, match="slo"):
            parse_slo(text)
