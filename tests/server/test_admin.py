"""/load, abort by id, and what operators may see and do."""

from __future__ import annotations

import asyncio
import json

import pytest
from scripted_engine import data_lines

from quire.config import EngineConfig, ModelConfig, engine_options, server_options
from quire.errors import MemoryFitError
from quire.server.admin import HIDDEN, SECRET_WORDS

COMPLETIONS = "/v1/completions"
HIDDEN_ROUTES = [
    ("GET", "/server_info"), ("GET", "/is_sleeping"), ("GET", "/tokenizer_info"),
    ("POST", "/reset_prefix_cache"), ("POST", "/sleep"), ("POST", "/wake_up"),
]  # fmt: skip


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def started(engine, count: int) -> str:
    """Waits for so many prompts to run. The id of the first one's answer, which a stream's client knows."""
    while len(engine.streams) < count:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    return engine.submitted[0].request_id.removesuffix("-0")


async def abort(client, *ids: str, **options) -> list[str]:
    response = await client.post("/abort_requests", json={"request_ids": list(ids)}, **options)
    assert response.status_code == 200, response.text
    return response.json()["aborted"]


async def test_load_counts_what_is_being_answered(client, engine):
    async def load() -> int:
        return (await client.get("/load")).json()["server_load"]

    assert await load() == 0
    engine.hold()
    asking = [
        asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "a"})),
        asyncio.create_task(client.post("/v1/embeddings", json={"input": ["a", "b"]})),
    ]
    await started(engine, 3)
    assert await load() == 2
    engine.release()
    await asyncio.gather(*asking)
    assert await load() == 0


@pytest.mark.parametrize("streamed", [False, True])
async def test_abort_by_the_answers_id(client, engine, streamed):
    engine.hold()
    body = {"prompt": ["a", "b"], "stream": streamed}
    asking = asyncio.create_task(client.post(COMPLETIONS, json=body))
    answer = await started(engine, 2)
    other = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "c"}))
    await started(engine, 3)
    assert answer.startswith("cmpl-")
    assert await abort(client, "cmpl-unknown", answer) == [answer]
    assert [s.aborts for s in engine.streams] == [1, 1, 0]
    engine.release()
    response = await asking
    assert response.status_code == 200
    chunks = (
        [json.loads(line) for line in data_lines(response.content)[:-1]]
        if streamed
        else [response.json()]
    )
    assert {chunk["id"] for chunk in chunks} == {answer}
    ends = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert ends == ["abort", "abort"]
    assert (await other).json()["choices"][0]["finish_reason"] == "stop"
    assert await abort(client, answer) == []


async def test_an_aborted_embedding_is_no_answer(client, engine):
    engine.hold()
    asking = asyncio.create_task(client.post("/v1/embeddings", json={"input": "a"}))
    answer = await started(engine, 1)
    assert await abort(client, answer) == [answer]
    engine.release()
    assert (await asking).status_code == 499


async def test_only_the_key_that_started_it_may_abort_it(make_client, engine):
    client = make_client(api_keys=("mine", "theirs"))
    engine.hold()
    asking = asyncio.create_task(
        client.post(COMPLETIONS, json={"prompt": "a"}, headers=bearer("mine"))
    )
    answer = await started(engine, 1)
    assert await abort(client, answer, headers=bearer("theirs")) == []
    assert engine.streams[0].aborts == 0
    asked = {"request_ids": [answer]}
    assert (await client.post("/abort_requests", json=asked)).status_code == 401
    assert await abort(client, answer, headers=bearer("mine")) == [answer]
    engine.release()
    await asking


@pytest.mark.parametrize("ids", [None, [], [""], "x", [1], ["x"] * 1025])
async def test_abort_needs_ids(client, ids):
    response = await client.post("/abort_requests", json={"request_ids": ids})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("body.request_ids")


@pytest.mark.parametrize(("method", "path"), HIDDEN_ROUTES)
async def test_absent_unless_enabled_and_never_without_a_key(make_client, method, path):
    assert (await make_client().request(method, path)).status_code == 404
    flags = {"enable_admin_endpoints": True, "enable_tokenizer_info_endpoint": True}
    locked = make_client(api_keys=("k",), **flags)
    assert (await locked.request(method, path)).status_code == 401
    answer = await locked.request(method, path, headers=bearer("k"))
    assert answer.status_code in (200, 501), answer.text


async def test_server_info_has_every_option_and_no_secret(make_client):
    keys = ("sk-one", "sk-two")
    client = make_client(
        enable_admin_endpoints=True, api_key=keys, ssl_keyfile="/k", ssl_certfile="/c"
    )
    client.state.engine_config = EngineConfig(ModelConfig(hf_token="hf_secret"))
    response = await client.get("/server_info")
    body = response.json()
    assert body["models"] == ["tiny", "alias"]
    for info in [*engine_options(), *server_options()]:
        assert info.name in body["config"][info.group], info.name
    assert body["config"]["model"]["hf_token"] == body["config"]["server"]["api_key"] == HIDDEN
    for secret in (*keys, "hf_secret", '"/k"'):
        assert secret not in response.text
    assert body["config"]["scheduler"]["long_prefill_token_threshold"] == 0


def test_no_option_that_sounds_secret_goes_unhidden():
    """A new one must have a word of ours in its name, or be listed here as harmless."""
    harmless = {"tokenizer", "max_num_batched_tokens", "max_num_queued_tokens",
                "enable_tokenizer_info_endpoint", "spec_tokens"}  # fmt: skip
    for info in [*engine_options(), *server_options()]:
        sounds = any(word in info.name for word in ("key", "token", "secret", "passw", "cred"))
        if sounds and info.name not in harmless and not info.is_bool:
            assert not SECRET_WORDS.isdisjoint(info.name.split("_")), info.name


async def test_tokenizer_info(make_client):
    client = make_client(enable_tokenizer_info_endpoint=True)
    body = (await client.get("/tokenizer_info")).json()
    assert body["eos_token"] == "<eos>" and "bos_token" not in body
    assert body["chat_template"] == "{{ messages }}"
    assert body["model_max_length"] == 64
    assert not any("/" in str(value) for value in body.values())


async def test_reset_prefix_cache(make_client, engine):
    client = make_client(enable_admin_endpoints=True)
    response = await client.post("/reset_prefix_cache?reset_external=false")
    assert response.json() == {"success": True} and engine.resets == 1
    refused = await client.post("/reset_prefix_cache?reset_running_requests=true")
    assert refused.status_code == 400 and engine.resets == 1
    assert refused.json()["error"]["param"] == "reset_running_requests"


async def test_sleep_and_wake(make_client, engine):
    client = make_client(enable_admin_endpoints=True)
    response = await client.post("/sleep")
    assert response.status_code == 501 and response.json()["error"]["type"] == "NotImplementedError"
    engine.is_sleeping, engine.levels = False, []

    async def sleep(level: int = 1) -> None:
        engine.levels.append(level)
        engine.is_sleeping = True

    async def wake_up() -> None:
        engine.is_sleeping = False

    engine.sleep, engine.wake_up = sleep, wake_up

    async def sleeping() -> bool:
        return (await client.get("/is_sleeping")).json()["is_sleeping"]

    assert not await sleeping()
    assert (await client.post("/sleep?level=2&mode=wait")).status_code == 200
    assert await sleeping()
    assert (await client.get("/ready")).json() == {"status": "sleeping"}
    assert (await client.get("/health")).status_code == 200
    assert (await client.post("/wake_up")).status_code == 200
    assert not await sleeping()
    assert (await client.get("/ready")).status_code == 200
    assert (await client.post("/sleep")).status_code == 200 and engine.levels == [2, 1]

    async def too_little() -> None:
        raise MemoryFitError("Free 2 GB, or lower --kv-cache-memory-bytes.")

    engine.wake_up = too_little
    failed = await client.post("/wake_up")
    assert failed.status_code == 500 and "Free 2 GB" in failed.json()["error"]["message"]
    for query, param in (("/sleep?level=7", "level"), ("/sleep?mode=keep", "mode"),
                         ("/wake_up?tags=weights", "tags")):  # fmt: skip
        refused = await client.post(query)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
