"""The real clients of OpenAI and Anthropic, and litellm, against a server that throttles: they wait as long
as the headers say, and what they cannot obey is not sent.

Nothing here waits: `anyio.sleep`, with which the clients wait, moves the clock of the quotas instead.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import anthropic
import anyio
import httpx2
import openai
import pytest
from tests.server.test_keys import ALICE, entry

from quire.errors import QueueFullError
from quire.server.keys import Keys
from quire.server.quotas import Quotas

MESSAGES = [{"role": "user", "content": "a"}]


@dataclass
class Site:
    """An app, the requests that reach it, and the clock by which it throttles."""

    app: object
    now: float = 1000.0
    statuses: list[int] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    def http(self) -> httpx2.AsyncClient:
        async def note(response: httpx2.Response) -> None:
            self.statuses.append(response.status_code)

        return httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=self.app), event_hooks={"response": [note]}
        )

    def openai(self, retries: int = 2) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url="http://test/v1", api_key=ALICE, http_client=self.http(), max_retries=retries
        )

    def anthropic(self, retries: int = 2) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(
            base_url="http://test", api_key=ALICE, http_client=self.http(), max_retries=retries
        )


@pytest.fixture
def make_site(monkeypatch) -> Callable[[object], Site]:
    def make(app: object) -> Site:
        site = Site(app)

        async def sleep(seconds: float) -> None:
            site.slept.append(seconds)
            site.now += seconds

        monkeypatch.setattr(anyio, "sleep", sleep)
        return site

    return make


@pytest.fixture
def throttling(make_client, make_site, tmp_path: Path):
    """`throttling("rpm = 60")`: the site, and the quotas of its one tenant."""

    def make(limits: str) -> tuple[Site, Quotas]:
        path = tmp_path / "keys.toml"
        path.write_text(entry(ALICE, "a"))
        keys = Keys(path=path)
        client = make_client(api_keys=keys)
        site = make_site(client._transport.app)
        keys.tenants["a"].quotas._clock = lambda: site.now
        path.write_text(entry(ALICE, "a") + f"[tenants.a]\n{limits}\n")
        keys.use(path.read_bytes())
        return site, keys.tenants["a"].quotas

    return make


async def ask_openai(site: Site) -> None:
    await site.openai().chat.completions.create(model="", messages=MESSAGES, max_tokens=2)


async def ask_anthropic(site: Site) -> None:
    await site.anthropic().messages.create(model="", messages=MESSAGES, max_tokens=2)


Ask = Callable[[Site], Awaitable[None]]
clients = pytest.mark.parametrize("ask", [ask_openai, ask_anthropic])


@clients
async def test_they_wait_to_the_millisecond(throttling, engine, ask: Ask) -> None:
    site, quotas = throttling("rpm = 600")
    for _ in range(600):
        quotas.take(0)
    await ask(site)
    assert (site.slept, site.statuses, len(engine.submitted)) == ([0.1], [429, 200], 1)


@clients
async def test_a_full_queue_says_whole_seconds(
    make_client, make_site, engine, ask: Ask, monkeypatch
) -> None:
    site, submit = make_site(make_client()._transport.app), engine.submit

    def refuse_once(*args, **kwargs):
        if not site.statuses:
            raise QueueFullError("The queue is full.", retry_after=6.4)
        return submit(*args, **kwargs)

    monkeypatch.setattr(engine, "submit", refuse_once)
    await ask(site)
    assert site.statuses == [429, 200]
    assert len(site.slept) == 1 and 6.4 <= site.slept[0] <= 7


@clients
async def test_a_long_wait_is_asked_for_in_parts_that_clients_obey(throttling, ask: Ask) -> None:
    """A debt of five minutes. The largest wait that we name is 60 s, and each client waits that long as often
    as it tries again. In the end it raises, and the caller can read why and when to come back."""
    site, quotas = throttling("tpm = 600")
    quotas.take(3000)
    with pytest.raises((openai.RateLimitError, anthropic.RateLimitError)) as refused:
        await ask(site)
    assert (site.slept, site.statuses) == ([60.0, 60.0], [429, 429, 429])
    assert "600 tokens a minute" in str(refused.value)
    headers = refused.value.response.headers
    assert headers["x-ratelimit-limit-tokens"] == "600"
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert headers["x-ratelimit-reset-tokens"] == "3m0s"


@pytest.mark.parametrize(
    ("ask", "seconds", "slept"),
    [
        (ask_openai, "120", [120.0]),
        (ask_openai, "121", []),
        (ask_anthropic, "121", [121.0]),
    ],
)
async def test_what_clients_do_above_our_limit(make_site, ask: Ask, seconds: str, slept) -> None:
    """Why `MOST_RETRY_SECONDS` is what it is: openai's client gives up above 120 s."""

    async def app(scope, receive, send) -> None:
        headers = [(b"retry-after", seconds.encode()), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    site = make_site(app)
    with pytest.raises((openai.RateLimitError, anthropic.RateLimitError)):
        await ask(site)
    assert site.slept == slept * 2 and len(site.statuses) == 1 + len(site.slept)


async def test_a_stream_is_asked_for_again_before_it_begins_and_not_after(
    throttling, engine
) -> None:
    site, quotas = throttling("rpm = 600")
    for _ in range(600):
        quotas.take(0)
    stream = await site.openai().chat.completions.create(model="", messages=MESSAGES, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(parts) == "Hello there, world!" and site.statuses == [429, 200]
    site.now += 60
    engine.fail_at = 2
    stream = await site.openai().chat.completions.create(model="", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
    assert site.statuses == [429, 200, 200] and len(site.slept) == 1


async def test_what_is_left_can_be_read_from_every_answer(throttling) -> None:
    site, _ = throttling("rpm = 600\ntpm = 100000")
    answers = [
        await site.openai().chat.completions.with_raw_response.create(
            model="", messages=MESSAGES, max_tokens=2
        ),
        await site.anthropic().messages.with_raw_response.create(
            model="", messages=MESSAGES, max_tokens=2
        ),
    ]
    for number, answer in enumerate(answers, 1):
        assert answer.headers["x-ratelimit-limit-requests"] == "600"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(600 - number)
        assert 90_000 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 100_000
        for kind in ("requests", "tokens"):
            reset = answer.headers[f"x-ratelimit-reset-{kind}"]
            assert re.fullmatch(r"\d+ms|(\d+m)?\d+(\.\d+)?s", reset), "Go reads it"


# --- litellm ------------------------------------------------------------------------------------------


@pytest.fixture
def litellm():
    """200 MB and 30 packages, for these two tests: it is not among the pinned test tools."""
    return pytest.importorskip("litellm", reason="pip install litellm, to try its retries")


async def test_litellm_waits_as_openai_does_and_shows_what_is_left(throttling, litellm) -> None:
    site, quotas = throttling("rpm = 600\ntpm = 100000")
    for _ in range(600):
        quotas.take(0)
    answer = await litellm.acompletion(
        model="openai/tiny", messages=MESSAGES, max_tokens=2, client=site.openai()
    )
    assert answer.choices[0].message.content
    assert (site.slept, site.statuses) == ([0.1], [429, 200])
    headers = answer._hidden_params["additional_headers"]
    limit, left, tokens = (
        int(headers[f"x-ratelimit-{name}"])
        for name in ("limit-requests", "remaining-requests", "remaining-tokens")
    )
    assert (limit, left) == (600, 0) and 90_000 < tokens < 100_000


async def test_a_router_of_litellm_waits_as_long_as_it_is_told(litellm) -> None:
    """The wait before its own retry is ours and less than a second more, up to 60 s. Above it is a guess."""
    for seconds, obeyed in ((7, True), (60, True), (61, False)):
        headers = httpx2.Headers({"retry-after": str(seconds)})
        wait = litellm.calculate_retry_after(
            remaining_retries=2, max_retries=2, response_headers=headers
        )
        assert (seconds <= wait < seconds + 1) == obeyed
