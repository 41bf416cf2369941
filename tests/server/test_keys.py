"""API keys from a file: tenants, quotas, and what changes while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from pathlib import Path

import anthropic
import httpx
import httpx2
import openai
import pytest

from quire.cli.main import main
from quire.config import from_flat
from quire.errors import ConfigError
from quire.server import keys as keys_module
from quire.server.errors import ApiError
from quire.server.keys import Keys, with_fair_shares
from quire.server.quotas import Quotas, go_duration

ALICE, BOB, EVE = "sk-alice", "sk-bob", "sk-eve"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(key: str, tenant: str, more: str = "") -> str:
    return f'[[keys]]\nsha256 = "{digest(key)}"\ntenant = "{tenant}"\n{more}\n'


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(entry(ALICE, "a") + entry(BOB, "b"))
    return path


def tenant_of(keys: Keys, key: str) -> str | None:
    found = keys.find(key.encode())
    return None if found is None else found.tenant.name


# --- the file -------------------------------------------------------------------------------------


def test_a_key_belongs_to_its_tenant_and_flags_still_work(path: Path) -> None:
    keys = Keys(["plain"], path)
    assert [tenant_of(keys, key) for key in (ALICE, BOB, EVE)] == ["a", "b", None]
    assert tenant_of(keys, "plain") == f"key-{digest('plain')[:16]}"
    assert tenant_of(keys, digest(ALICE)) is None, "a digest is no key"


def test_json_is_read_too(path: Path) -> None:
    key = {"sha256": digest(ALICE), "tenant": "a"}
    path.write_text(json.dumps({"keys": [key], "tenants": {"a": {"rpm": 5}}}))
    assert tenant_of(Keys(path=path), ALICE) == "a"


@pytest.mark.parametrize(
    ("expires", "works"),
    [
        ("2001-01-01", False),
        ("2001-01-01T00:00:00Z", False),
        ('"2001-01-01T00:00:00+02:00"', False),
        ("2999-01-01", True),
        ("2999-01-01T00:00:00", True),
    ],
)
def test_keys_expire(path: Path, expires: str, works: bool) -> None:
    path.write_text(entry(ALICE, "a", f"expires = {expires}"))
    assert (tenant_of(Keys(path=path), ALICE) is not None) == works


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("keys = 3", r"Expected `array`"),
        ("[[keys]]\ntenant = 'a'", "missing required field `sha256`"),
        (entry(ALICE, "a", "colour = 1"), "unknown field `colour`"),
        (entry(ALICE, "a") + entry(ALICE, "b"), r"keys\[1\] is there twice"),
        (entry(ALICE, "a/b"), "matching regex"),
        (entry(ALICE, "a") + "[tenants.a]\nrpm = 0", "rpm"),
        (entry(ALICE, "a") + "[tenants.a]\nweight = -1", "weight"),
        (entry(ALICE, "a", "expires = 5"), r"keys\[0\].expires"),
        (entry(ALICE, "a", 'expires = "soon"'), r"keys\[0\].expires"),
        ('[[keys]]\nsha256 = "sk-alice"\ntenant = "a"', "matching regex"),
        ("[[", "key part"),
        ("\xff", "keys.toml"),
    ],
)
def test_mistakes_are_named(path: Path, text: str, complaint: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=complaint) as error:
        Keys(path=path)
    assert "keys.toml" in str(error.value) and ALICE not in str(error.value)


def test_a_missing_file_is_an_error_and_not_a_server_without_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        Keys(path=tmp_path / "none.toml")
    path = tmp_path / "empty.toml"
    path.write_text("keys = []")
    assert Keys(path=path), "requests need a key that nobody has yet"


def test_a_new_key_fits_in_the_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["api-key", "--tenant", "c", "--name", 'the "new" one', "--expires", "2999-01-31"])
        == 0
    )
    done = capsys.readouterr()
    path.write_text(path.read_text() + done.out)
    assert tenant_of(Keys(path=path), done.err.strip()) == "c"
    assert done.err.strip() not in done.out
    assert main(["api-key", "--tenant", "no spaces"]) == 2


# --- changes while it runs ------------------------------------------------------------------------


async def test_changes_take_effect_and_mistakes_do_not(path: Path, caplog) -> None:
    keys = Keys(path=path)
    path.write_text(entry(BOB, "b") + entry(EVE, "a"))
    await keys.check()
    assert [tenant_of(keys, key) for key in (ALICE, BOB, EVE)] == [None, "b", "a"]
    path.write_text("[[")
    for _ in range(3):
        await keys.check()
    assert tenant_of(keys, EVE) == "a" and not keys.is_current
    path.unlink()
    for _ in range(3):
        await keys.check()
    assert tenant_of(keys, EVE) == "a" and not keys.is_current
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2 and all("stay as they were" in each.getMessage() for each in errors)
    path.write_text(entry(BOB, "b") + entry(EVE, "a"))  # as before: nothing is new, all is well
    await keys.check()
    assert keys.is_current


async def test_a_secret_of_kubernetes_is_followed(tmp_path: Path, monkeypatch) -> None:
    """Its file is a link to a file in ..data, which is a link to a directory that is exchanged."""
    monkeypatch.setattr(keys_module, "CHECK_SECONDS", 0.01)
    for number, key in enumerate((ALICE, BOB)):
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "keys.toml").write_text(entry(key, "a"))
    (tmp_path / "..data").symlink_to("v0")
    (tmp_path / "keys.toml").symlink_to("..data/keys.toml")
    keys = Keys(path=tmp_path / "keys.toml")
    async with keys.followed():
        (tmp_path / "new").symlink_to("v1")
        os.rename(tmp_path / "new", tmp_path / "..data")
        async with asyncio.timeout(10):
            while tenant_of(keys, BOB) is None:
                await asyncio.sleep(0.01)
    assert tenant_of(keys, ALICE) is None


async def test_what_a_tenant_has_used_outlasts_a_change(path: Path) -> None:
    path.write_text(entry(ALICE, "a") + "[tenants.a]\nrpm = 2\n")
    keys = Keys(path=path)
    quotas = keys.tenants["a"].quotas
    quotas.take(0), quotas.take(0)
    path.write_text(entry(BOB, "a") + "[tenants.a]\nrpm = 4\nweight = 2.0\n")
    await keys.check()
    assert keys.tenants["a"].quotas is quotas and keys.tenants["a"].options.weight == 2
    with pytest.raises(Exception, match="limit of 4 requests a minute"):
        quotas.take(0)


# --- requests -------------------------------------------------------------------------------------


async def ask(client, key: str, **body):
    return await client.post("/v1/completions", json={"prompt": "a b", **body}, headers=bearer(key))


async def test_a_request_gets_its_tenants_place(make_client, engine, path: Path) -> None:
    path.write_text(
        entry(ALICE, "a")
        + entry(BOB, "b")
        + entry(EVE, "open")
        + "[tenants.b]\nbest_priority = 3\n[tenants.open]\nbest_priority = -5\nshared_cache = true\n"
    )
    client = make_client(api_keys=Keys(path=path))
    for key, body in (
        (ALICE, {}), (ALICE, {"cache_salt": "s", "priority": -7}), (BOB, {}), (BOB, {"priority": 9}),
        (EVE, {}), (EVE, {"cache_salt": "a/s", "priority": -9}),
    ):  # fmt: skip
        assert (await ask(client, key, **body)).status_code == 200
    places = [each.placement for each in engine.submitted]
    assert [(each.tenant, each.priority, each.cache_salt) for each in places] == [
        ("a", 0, "a"), ("a", 0, "a/s"), ("b", 3, "b"), ("b", 9, "b"),
        ("open", 0, None), ("open", -5, "/a/s"),
    ]  # fmt: skip
    assert len({each.cache_salt for each in places}) == 5, "nobody can name another's salt"


async def test_one_key_alone_needs_no_salt(make_client, engine) -> None:
    await ask(make_client(api_keys=("k",)), "k")
    assert engine.submitted[0].placement.cache_salt is None


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
async def test_every_endpoint_counts(make_client, path: Path, url: str, body: dict) -> None:
    path.write_text(entry(ALICE, "a") + "[tenants.a]\nrpm = 1\n")
    keys = Keys(path=path)
    client = make_client(api_keys=keys)
    first = await client.post(url, json=body, headers=bearer(ALICE))
    assert first.status_code == 200 and first.headers["x-ratelimit-remaining-requests"] == "0"
    second = await client.post(url, json=body, headers=bearer(ALICE))
    assert second.status_code == 429 and keys.tenants["a"].quotas.num_running == 0
    assert 0 < int(second.headers["retry-after-ms"]) <= 60_000
    assert 0 < int(second.headers["retry-after"]) <= 60
    assert second.headers["x-ratelimit-limit-requests"] == "1"
    assert "1 requests a minute" in second.text


async def test_tokens_are_reserved_and_what_is_left_given_back(make_client, engine, path) -> None:
    path.write_text(entry(ALICE, "a") + "[tenants.a]\ntpm = 1000\n")
    keys = Keys(path=path)
    client = make_client(api_keys=keys)
    for stream in (False, True):
        before = keys.tenants["a"].quotas.headers()["x-ratelimit-remaining-tokens"]
        response = await ask(client, ALICE, max_tokens=50, stream=stream)
        assert response.status_code == 200
        left = int(keys.tenants["a"].quotas.headers()["x-ratelimit-remaining-tokens"])
        assert int(before) - 20 < left < int(before), "the prompt and the few tokens of the answer"


async def test_requests_at_a_time(make_client, engine, path: Path) -> None:
    path.write_text(entry(ALICE, "a") + entry(BOB, "b") + "[tenants.a]\nconcurrency = 1\n")
    keys = Keys(path=path)
    client = make_client(api_keys=keys)
    lease = keys.tenants["a"].quotas.take(1)
    refused = await ask(client, ALICE)
    assert refused.status_code == 429 and "1 requests at a time" in refused.text
    assert (await ask(client, BOB)).status_code == 200
    lease.cancel()
    assert (await ask(client, ALICE)).status_code == 200


async def test_a_refused_request_takes_nothing(make_client, engine, path: Path) -> None:
    path.write_text(entry(ALICE, "a") + "[tenants.a]\nrpm = 100\ntpm = 1000\nconcurrency = 1\n")
    keys = Keys(path=path)
    client = make_client(api_keys=keys)
    assert (await ask(client, ALICE, temperature=-1)).status_code == 400
    assert keys.tenants["a"].quotas.headers()["x-ratelimit-remaining-requests"] == "100"
    assert keys.tenants["a"].quotas.num_running == 0


async def ask_openai(http: httpx.AsyncClient) -> None:
    client = openai.AsyncOpenAI(
        base_url="http://test/v1", api_key=ALICE, http_client=http, max_retries=2
    )
    await client.completions.create(model="", prompt="a", max_tokens=2)


async def ask_anthropic(http: httpx.AsyncClient) -> None:
    transport = http._transport
    inner = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(transport.app), event_hooks=http.event_hooks
    )
    client = anthropic.AsyncAnthropic(
        base_url="http://test", api_key=ALICE, http_client=inner, max_retries=2
    )
    messages = [{"role": "user", "content": "a"}]
    await client.messages.create(model="", max_tokens=2, messages=messages)


@pytest.mark.parametrize("ask_by", [ask_openai, ask_anthropic])
async def test_clients_wait_as_long_as_they_are_told(
    make_client, engine, path: Path, ask_by
) -> None:
    """Without the header they wait half a second or more before the first retry."""
    path.write_text(entry(ALICE, "a") + "[tenants.a]\nrpm = 600\n")
    keys = Keys(path=path)
    http, statuses = make_client(api_keys=keys), []

    async def note(response: httpx.Response) -> None:
        statuses.append((response.status_code, response.headers.get("retry-after-ms")))

    http.event_hooks = {"response": [note]}
    for _ in range(601):
        with contextlib.suppress(ApiError):
            keys.tenants["a"].quotas.take(0)
    await ask_by(http)
    assert [status for status, _ in statuses] == [429, 200]
    assert 0 < int(statuses[0][1]) <= 101 and len(engine.submitted) == 1


async def test_metrics_say_who_was_refused(make_client, path: Path) -> None:
    path.write_text(entry(ALICE, "a") + "[tenants.a]\nrpm = 1\n")
    client = make_client(api_keys=Keys(path=path))
    for _ in range(3):
        await ask(client, ALICE)
    page = (await client.get("/metrics")).text
    assert 'quire:quota_refusals_total{quota="requests",tenant="a"} 2.0' in page
    assert 'quire:tenant_requests{tenant="a"} 0.0' in page
    assert "quire:api_keys_file_current 1.0" in page and ALICE not in page


# --- the buckets ----------------------------------------------------------------------------------


def test_a_bucket_fills_evenly_and_never_above_its_size() -> None:
    now = [1000.0]
    quotas = Quotas(rpm=60, clock=lambda: now[0])
    for _ in range(60):
        quotas.take(0)
    with pytest.raises(Exception, match="60 requests a minute") as error:
        quotas.take(0)
    assert error.value.headers["retry-after-ms"] == "1000"
    now[0] += 1
    quotas.take(0)
    now[0] += 3600
    assert quotas.headers()["x-ratelimit-remaining-requests"] == "60"


def test_a_request_larger_than_a_minute_starts_when_the_bucket_is_full() -> None:
    now = [1000.0]
    quotas = Quotas(tpm=600, clock=lambda: now[0])
    quotas.take(3000).cancel()
    quotas.take(3000)
    now[0] += 239
    with pytest.raises(Exception, match="600 tokens"):
        quotas.take(1)
    now[0] += 2
    quotas.take(1)


def test_more_than_reserved_is_charged() -> None:
    now = [1000.0]
    quotas = Quotas(tpm=600, clock=lambda: now[0])
    lease = quotas.take(100)
    lease.used = 300
    lease.num_streams = 1
    lease.stream_ended()
    assert quotas.headers()["x-ratelimit-remaining-tokens"] == "300"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.012, "12ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9991, "1m0s"),
        (360, "6m0s"),
        (61.25, "1m1.25s"),
    ],
)
def test_durations_are_gos(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


# --- the schedule ---------------------------------------------------------------------------------


def test_several_tenants_get_fair_shares_unless_another_policy_is_asked_for(path: Path) -> None:
    def policy(keys: Keys, **options: str) -> str:
        return with_fair_shares(from_flat(options), keys).scheduler.scheduling_policy

    assert policy(Keys()) == policy(Keys(["k"])) == "auto"
    assert policy(Keys(["k", "l"])) == policy(Keys(path=path)) == "fair"
    assert policy(Keys(path=path), scheduling_policy="fcfs") == "fcfs"
