"""How long a prompt's KV should stay: cache_control, prompt_cache_retention, retain_seconds."""

from __future__ import annotations

import pytest

from quire.config import from_flat
from quire.placement import Retain
from quire.server.retention import created

EPHEMERAL = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}


def text(words: str, control: object = None) -> dict[str, object]:
    block: dict[str, object] = {"type": "text", "text": words}
    return block if control is None else block | {"cache_control": control}


async def wishes(client, engine, url: str = "/v1/messages", **body: object):
    """Of the submitted prompt: (seconds, its first tokens as a text)."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5} | body
    response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    submitted = engine.submitted[-1]
    decode = engine.model.tokenizer.decode
    found = {
        wish.seconds: decode(submitted.prompt[: wish.num_tokens])
        for wish in submitted.placement.retain
    }
    return found, response.json()["usage"]


@pytest.fixture(autouse=True)
def room(engine):
    engine.model.max_model_len = 4096


CALL = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
TALK = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": [text("three four"), CALL]},
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "c", "content": "five six"}],
    },
]


async def test_a_mark_at_the_end_is_of_the_whole_prompt(client, engine) -> None:
    talk = [{"role": "user", "content": [text("a b c", EPHEMERAL)]}]
    found, usage = await wishes(client, engine, messages=talk)
    assert found == {300.0: "user: a b c\nassistant:"}
    assert usage["cache_read_input_tokens"] == 2  # the scripted engine's
    new = len(engine.submitted[-1].prompt) - 2
    assert (usage["cache_creation_input_tokens"], usage["input_tokens"]) == (new, 0)
    kinds = {"ephemeral_5m_input_tokens": new, "ephemeral_1h_input_tokens": 0}
    assert usage["cache_creation"] == kinds


async def test_a_mark_in_the_middle_is_of_what_is_before_it(client, engine) -> None:
    system = [text("Be kind."), text("Be brief and useful now.", HOUR)]
    found, usage = await wishes(client, engine, system=system, messages=TALK)
    ((seconds, prompt),) = found.items()
    assert seconds == 3600.0
    assert prompt.startswith("system: Be kind.") and "useful now." in prompt
    assert "five" not in prompt
    assert usage["cache_creation"]["ephemeral_5m_input_tokens"] == 0
    assert sum(usage["cache_creation"].values()) == usage["cache_creation_input_tokens"] > 0
    total = usage["input_tokens"] + usage["cache_creation_input_tokens"] + 2
    assert total == len(engine.submitted[-1].prompt)


async def test_each_time_has_its_furthest_mark_and_a_longer_one_before_it_none(client, engine):
    system = [text("S1 S2", HOUR)]
    talk = [
        {"role": "user", "content": [text("one", EPHEMERAL)]},
        {"role": "assistant", "content": [text("two")]},
        {"role": "user", "content": [text("three four", EPHEMERAL), text("five six")]},
    ]
    found, _ = await wishes(client, engine, system=system, messages=talk)
    assert list(found) == [3600.0, 300.0]
    assert "S2" in found[3600.0] and "one" not in found[3600.0]
    assert "three" in found[300.0] and "six" not in found[300.0]
    found, _ = await wishes(client, engine, system=[text("S", EPHEMERAL)], cache_control=HOUR)
    assert list(found) == [3600.0] and found[3600.0].endswith("assistant:")


async def test_a_mark_on_a_call_or_a_tool_counts_where_it_can_be_found(client, engine) -> None:
    talk = [
        TALK[0],
        {"role": "assistant", "content": [text("three four"), CALL | {"cache_control": HOUR}]},
    ]
    found, _ = await wishes(client, engine, messages=[*talk, TALK[2]])
    assert "four" in found[3600.0] and "five" not in found[3600.0]
    tool = {"name": "f", "description": "unseen", "input_schema": {}, "cache_control": HOUR}
    found, _ = await wishes(
        client, engine, messages=TALK, tools=[tool], tool_choice={"type": "none"}
    )
    assert found == {}  # this template shows no tools


@pytest.mark.parametrize("control", [{}, {"type": "other"}, "ephemeral", 5])
async def test_what_is_no_mark_is_refused(client, control) -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": control}]}]
    response = await client.post("/v1/messages", json={"messages": talk, "max_tokens": 5})
    assert response.status_code == 400
    assert "cache_control must be" in response.json()["error"]["message"]


async def test_without_a_mark_nothing_is_created(client, engine) -> None:
    talk = [{"role": "user", "content": [text("a b", EPHEMERAL), text("c d")]}]
    found, _ = await wishes(client, engine, messages=talk)
    assert "a b" in found[300.0] and "d" not in found[300.0].split()
    found, usage = await wishes(client, engine, cache_control=None)
    assert found == {} and usage["cache_creation_input_tokens"] == 0
    assert "cache_creation" not in usage


async def test_without_a_prefix_cache_nothing_is_created(make_client, engine) -> None:
    client = make_client(engine_config=from_flat({"enable_prefix_caching": False}))
    found, usage = await wishes(client, engine, cache_control=EPHEMERAL)
    assert found == {} and usage["cache_creation_input_tokens"] == 0


@pytest.mark.parametrize("ttl", ["soon", 5, "0m", "5 m"])
async def test_a_time_that_is_none_is_refused(client, ttl) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}
    control = {"cache_control": {"type": "ephemeral", "ttl": ttl}}
    response = await client.post("/v1/messages", json=body | control)
    assert response.status_code == 400 and "5m or 1h" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ({}, []),
        ({"retain_seconds": 90}, [90.0]),
        ({"prompt_cache_retention": "24h", "prompt_cache_key": "k"}, [86400.0]),
        ({"prompt_cache_retention": "in_memory"}, []),
        ({"prompt_cache_retention": "99999d"}, [30 * 86400.0]),
        ({"retain_seconds": 5.5, "prompt_cache_retention": "2h"}, [5.5, 7200.0]),
    ],
)
@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_a_whole_request(client, engine, url, body, seconds) -> None:
    prompts = {
        "/v1/completions": {"prompt": "a"},
        "/v1/responses": {"input": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    }
    response = await client.post(url, json=prompts[url] | body)
    assert response.status_code == 200, response.text
    assert engine.submitted[-1].placement.retain == tuple(map(Retain, seconds))


@pytest.mark.parametrize("seconds", [0, -1, 10**9, "5"])
async def test_seconds_have_bounds(client, seconds) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", "retain_seconds": seconds})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body.retain_seconds"


@pytest.mark.parametrize("word", ["forever", "24 h", "0h", "h"])
@pytest.mark.parametrize("url", ["/v1/completions", "/v1/responses"])
async def test_a_retention_that_is_none_is_refused(client, url, word) -> None:
    prompt = "input" if url.endswith("responses") else "prompt"
    body = {prompt: "a", "prompt_cache_retention": word}
    response = await client.post(url, json=body)
    assert response.status_code == 400
    assert "prompt_cache_retention" in response.json()["error"]["param"]


async def test_the_tenant_is_the_owner_of_the_key(make_client, engine) -> None:
    client = make_client(api_keys=("k1", "k2"))
    for key in ("k1", "k2", "k1"):
        headers = {"authorization": f"Bearer {key}"}
        await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    first, second, third = (each.placement.tenant for each in engine.submitted)
    assert first == third != second and "k1" not in first


def test_what_was_found_is_not_created() -> None:
    retain = (Retain(300.0, 100), Retain(3600.0, 60))
    assert created(retain, 0) == {3600.0: 60, 300.0: 40}
    assert created(retain, 80) == {300.0: 20}
    assert created(retain, 100) == {}
    assert created((Retain(60.0),), 0) == {}
