"""Quotas under any order of requests, refusals, ends, clocks and changes: never below zero, and what is given
back is what was not used."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tests.server.test_keys import ALICE, bearer, entry

from quire.errors import QueueFullError
from quire.outputs import CompletionOutput, RequestOutput
from quire.server.errors import ApiError
from quire.server.keys import Keys
from quire.server.quotas import ROUNDING_SECONDS, Lease, Quotas

limits = st.none() | st.sampled_from([1, 2, 7, 60, 1000])


class Stream:
    """A `RequestStream` that gives these numbers of tokens."""

    request_id = "r"

    def __init__(self) -> None:
        self.counts: list[int] = []

    def abort(self) -> None:
        pass

    async def __aiter__(self):
        for count in self.counts:
            yield output_of(count)


def output_of(count: int) -> RequestOutput:
    part = CompletionOutput(index=0, text="", token_ids=[7] * count)
    return RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=[1], outputs=[part], finished=False
    )


@dataclass
class Live:
    lease: Lease
    streams: list[object]
    seconds: dict[str, float]
    """What it owes of each bucket while it runs: by the rate at which it began."""
    per_token: float
    generation: dict[str, int]
    """The bucket's, by its kind."""
    used: int


class QuotaMachine(RuleBasedStateMachine):
    """The model: a bucket's debt is a number of seconds, of which a change of the rate changes nothing."""

    @initialize(rpm=limits, tpm=limits, concurrency=limits)
    def begin(self, rpm, tpm, concurrency) -> None:
        self.now = 1000.0
        self.quotas = Quotas(rpm, tpm, concurrency, clock=lambda: self.now)
        self.limits = {"requests": rpm, "tokens": tpm, "concurrency": concurrency}
        self.generation = {"requests": 0, "tokens": 0}
        self.debt = {"requests": 0.0, "tokens": 0.0}
        self.live: list[Live] = []

    def state(self) -> tuple[object, ...]:
        seconds = {kind: b.reset_seconds(self.now) for kind, b in self.quotas._rates.items()}
        return (self.quotas.headers(), seconds, self.quotas.num_running)

    def owe(self, kind: str, generation: int, seconds: float) -> None:
        if self.generation[kind] == generation and self.limits[kind] is not None:
            self.debt[kind] = max(0.0, self.debt[kind] + seconds)

    @rule(prompts=st.lists(st.integers(1, 50), min_size=1, max_size=3), room=st.integers(0, 90))
    def take(self, prompts, room) -> None:
        tokens = sum(prompts) + room
        before = self.state()
        fits = self.limits["concurrency"] is None or len(self.live) < self.limits["concurrency"]
        for kind, amount in (("requests", 1), ("tokens", tokens)):
            limit = self.limits[kind]
            if limit is not None:
                full = 60 - min(amount, limit) * 60 / limit
                fits = fits and self.debt[kind] <= full + ROUNDING_SECONDS / 2
        if not fits:
            with pytest.raises(ApiError) as refusal:
                self.quotas.take(tokens)
            assert self.state() == before, "a refused request takes nothing"
            assert 0 < int(refusal.value.headers["retry-after-ms"]) <= 60_000
            assert 0 < int(refusal.value.headers["retry-after"]) <= 60
            return
        lease = self.quotas.take(tokens)
        rates = {kind: self.limits[kind] for kind in ("requests", "tokens")}
        seconds = {
            kind: amount * 60 / rates[kind] if rates[kind] else 0.0
            for kind, amount in (("requests", 1), ("tokens", tokens))
        }
        live = Live(lease, [lease.metered(Stream(), prompt) for prompt in prompts], seconds,
                    60 / rates["tokens"] if rates["tokens"] else 0.0, dict(self.generation),
                    sum(prompts))  # fmt: skip
        self.live.append(live)
        for kind, owed in seconds.items():
            self.owe(kind, live.generation[kind], owed)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), counts=st.lists(st.integers(0, 40), max_size=3))
    def end(self, data, counts) -> None:
        """All streams of a request end, with these tokens, or are aborted."""
        live = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        running = self.quotas.num_running
        for number, stream in enumerate(live.streams):
            assert self.quotas.num_running == running, "until the last stream ends"
            if number == 0:
                stream._stream.counts = counts
                _drain(stream)
                live.used += sum(counts)
            stream.abort()
            stream.abort()
        back = live.used * live.per_token - live.seconds["tokens"]
        self.owe("tokens", live.generation["tokens"], back)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def refuse(self, data) -> None:
        """The engine's queue is full, at the first prompt or a later one."""
        live = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        live.lease.cancel()
        for stream in live.streams:
            stream.abort()
        for kind, seconds in live.seconds.items():
            self.owe(kind, live.generation[kind], -seconds)

    @rule(seconds=st.sampled_from([0.001, 0.5, 3.0, 30.0, 61.0, 3600.0]))
    def wait(self, seconds) -> None:
        self.now += seconds
        for kind in self.debt:
            self.debt[kind] = max(0.0, self.debt[kind] - seconds)

    @rule(rpm=limits, tpm=limits, concurrency=limits)
    def reload(self, rpm, tpm, concurrency) -> None:
        self.quotas.change(rpm, tpm, concurrency)
        for kind, limit in (("requests", rpm), ("tokens", tpm)):
            if limit is None or self.limits[kind] is None:
                self.generation[kind] += 1
                self.debt[kind] = 0.0
        self.limits = {"requests": rpm, "tokens": tpm, "concurrency": concurrency}

    @invariant()
    def what_is_left_is_what_was_not_used(self) -> None:
        assert self.quotas.num_running == len(self.live)
        headers = self.quotas.headers()
        for kind in ("requests", "tokens"):
            limit = self.limits[kind]
            if limit is None:
                assert f"x-ratelimit-limit-{kind}" not in headers
                continue
            assert self.quotas._rates[kind].reset_seconds(self.now) == pytest.approx(
                self.debt[kind], abs=1e-6
            )
            assert 0 <= int(headers[f"x-ratelimit-remaining-{kind}"]) <= limit


def _drain(stream: object) -> None:
    async def drain() -> None:
        async for _ in stream:  # type: ignore[attr-defined]
            pass

    coroutine = drain()
    with pytest.raises(StopIteration):
        coroutine.send(None)


TestQuotas = QuotaMachine.TestCase
TestQuotas.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(1, 500), st.floats(0, 20), st.floats(0, 1)), max_size=60)
)
def test_a_tenant_uses_no_more_than_its_rate(steps) -> None:
    """Whatever is reserved and given back: a bucket's worth at once, and what flows in."""
    now = [0.0]
    quotas, used = Quotas(tpm=500, clock=lambda: now[0]), 0.0
    for tokens, seconds, part in steps:
        try:
            lease = quotas.take(tokens)
        except ApiError:
            now[0] += seconds
            continue
        stream = lease.metered(Stream(), int(tokens * part))
        now[0] += seconds
        stream.abort()
        used += int(tokens * part)
        assert used <= 500 + now[0] * 500 / 60 + 1e-6


@pytest.mark.parametrize("rpm", [1, 3, 7, 11, 49, 997])
@pytest.mark.parametrize("now", [0.3, 1e4 + 0.7, 3e7 + 0.1])
def test_a_whole_minutes_worth_fits(rpm: int, now: float) -> None:
    """Whatever the sum of its parts is rounded to."""
    quotas = Quotas(rpm=rpm, clock=lambda: now)
    for left in reversed(range(rpm)):
        quotas.take(0)
        assert quotas.headers()["x-ratelimit-remaining-requests"] == str(left)
    with pytest.raises(ApiError):
        quotas.take(0)


def test_a_refund_after_a_change_is_that_of_its_own_request() -> None:
    """A thousand tokens were a minute's worth when they were reserved. Given back as a thousand of ten a
    minute they would pay for everything else as well."""
    now = [0.0]
    quotas = Quotas(tpm=1000, clock=lambda: now[0])
    first, second = quotas.take(500), quotas.take(400)
    quotas.change(None, 10, None)
    first.cancel()
    assert quotas.headers()["x-ratelimit-remaining-tokens"] == "6"
    quotas.change(None, None, None)
    quotas.change(None, 10, None)
    quotas.take(5)
    second.cancel()
    assert quotas.headers()["x-ratelimit-remaining-tokens"] == "5"


# --- through the server (tenants-overload.md, proof 5) ------------------------------------------------


@pytest.fixture
def tenant_keys(tmp_path) -> Keys:
    path = tmp_path / "keys.toml"
    path.write_text(entry(ALICE, "a") + "[tenants.a]\nrpm = 100\ntpm = 10000\nconcurrency = 4\n")
    return Keys(path=path)


@pytest.mark.parametrize("accepted", [0, 1, 2])
async def test_a_request_that_the_engine_refuses_takes_nothing(
    make_client, engine, tenant_keys, accepted: int, monkeypatch
) -> None:
    """At any of its prompts: those before it are aborted."""
    client, quotas = make_client(api_keys=tenant_keys), tenant_keys.tenants["a"].quotas
    before, submit = quotas.headers(), engine.submit

    def refuse(*args, **kwargs):
        if len(engine.submitted) == accepted:
            raise QueueFullError("The queue is full.", retry_after=3.0)
        return submit(*args, **kwargs)

    monkeypatch.setattr(engine, "submit", refuse)
    body = {"prompt": ["a", "b c", "d"], "max_tokens": 50, "n": 2}
    answer = await client.post("/v1/completions", json=body, headers=bearer(ALICE))
    assert answer.status_code == 429 and len(engine.submitted) == accepted
    assert (quotas.headers(), quotas.num_running) == (before, 0)


async def test_all_prompts_and_all_samples_are_reserved(make_client, engine, tenant_keys) -> None:
    client, quotas = make_client(api_keys=tenant_keys), tenant_keys.tenants["a"].quotas
    seen = []
    take = quotas.take
    quotas.take = lambda tokens: seen.append(tokens) or take(tokens)
    body = {"prompt": ["a", "b c"], "max_tokens": 50, "n": 3}
    answer = await client.post("/v1/completions", json=body, headers=bearer(ALICE))
    usage = answer.json()["usage"]
    assert seen == [usage["prompt_tokens"] + 2 * 3 * 50]
    used = 10_000 - int(quotas.headers()["x-ratelimit-remaining-tokens"])
    assert usage["total_tokens"] - 1 <= used <= usage["total_tokens"]
