"""/v1/embeddings and /pooling: shapes, inputs, what is refused."""

from __future__ import annotations

import asyncio
import base64
import struct

import openai
import pytest
from openai.types import CreateEmbeddingResponse, Embedding
from openai.types.embedding_create_params import EmbeddingCreateParams
from scripted_engine import queue_full

from quire.placement import Placement
from quire.sampling_params import PoolingParams
from quire.server import unsupported
from quire.server.pooling_schemas import EmbeddingRequest

URL = "/v1/embeddings"


async def post(client, path: str = URL, status: int = 200, **body) -> dict:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


async def refused(client, param: str | None, path: str = URL, **body) -> str:
    error = (await post(client, path, 400, **body))["error"]
    assert (error["param"], error["code"]) == (param, 400), error
    return error["message"]


async def test_whole_answer(client, engine):
    body = await post(client, model="tiny", input="a b")
    assert body.pop("id").startswith("embd-") and isinstance(body.pop("created"), int)
    [submitted] = engine.submitted
    vector = engine.embed(submitted.prompt, PoolingParams())
    assert sum(x * x for x in vector) == pytest.approx(1)
    assert body == {
        "object": "list",
        "model": "tiny",
        "data": [{"index": 0, "embedding": vector, "object": "embedding"}],
        "usage": {
            "prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }  # fmt: skip
    assert submitted.params == PoolingParams(pooling="last", normalize=True)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a b", [[1, 2, 3]]),
        (["a b", "b"], [[1, 2, 3], [1, 3]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
async def test_every_form_of_input(client, engine, given, prompts):
    engine.model.tokenizer.encode("a b")
    body = await post(client, input=given)
    assert [s.prompt for s in engine.submitted] == prompts
    assert [item["index"] for item in body["data"]] == list(range(len(prompts)))
    for item, prompt in zip(body["data"], prompts, strict=True):
        assert item["embedding"] == engine.embed(prompt, PoolingParams())
    assert body["usage"]["total_tokens"] == sum(map(len, prompts))


async def test_a_conversation_is_one_text_with_nobody_about_to_answer(client, engine):
    messages = [{"role": "user", "content": "hi there"}]
    await post(client, messages=messages)
    [submitted] = engine.submitted
    assert engine.model.tokenizer.decode(submitted.prompt) == "user: hi there\n"
    await post(client, messages=messages, add_generation_prompt=True)
    assert engine.model.tokenizer.decode(engine.submitted[1].prompt).endswith("assistant:")


async def test_how_a_vector_is_made_and_written(client, engine):
    options = {"dimensions": 3, "use_activation": False, "pooling": "mean"}
    plain = (await post(client, input="a b c a", **options))["data"][0]["embedding"]
    assert engine.submitted[0].params == PoolingParams(
        pooling="mean", normalize=False, dimensions=3
    )
    body = await post(client, input="a b c a", encoding_format="base64", **options)
    written = base64.b64decode(body["data"][0]["embedding"])
    assert list(struct.unpack("<3f", written)) == plain == [0.0, 0.0, 1.0]
    await post(client, input=[4, 5, 6, 7], truncate_prompt_tokens=2, priority=3, cache_salt="s")
    last = engine.submitted[-1]
    assert (last.prompt, last.placement) == ([6, 7], Placement(priority=3, cache_salt="s"))
    for limit, side, kept in ((2, "left", [6, 7]), (2, "right", [4, 5]), (-1, None, [4, 5, 6, 7])):
        cut = {"truncate_prompt_tokens": limit, "truncation_side": side}
        await post(client, input=[[4, 5, 6, 7]], **cut)
        assert engine.submitted[-1].prompt == kept
    await post(client, input=["a " * 500, "a"], truncate_prompt_tokens=9)
    assert [len(each.prompt) for each in engine.submitted[-2:]] == [9, 2]
    messages = [{"role": "user", "content": "a " * 500}]
    body = await post(client, messages=messages, truncate_prompt_tokens=9)
    assert body["usage"]["prompt_tokens"] == 9
    await post(client, input="a", add_special_tokens=False)
    assert engine.submitted[-1].prompt[0] != 1


async def test_pooling_is_the_same_in_vllms_shape(client, engine):
    body = await post(client, "/pooling", input=["a", "b c"], task="embed")
    assert body["id"].startswith("pool-") and body["object"] == "list"
    assert body["data"] == [
        {"index": i, "data": engine.embed(s.prompt, s.params), "object": "pooling"}
        for i, s in enumerate(engine.submitted)
    ]
    assert "no vector" in await refused(client, "input", "/pooling", input=[[]])
    assert "classify" in await refused(client, "task", "/pooling", input="a", task="classify")


async def test_what_is_refused(make_client, engine):
    client = make_client(max_prompts_per_request=2)
    await refused(client, "body.input")
    await refused(client, "body.input", input="a", messages=[{"role": "user", "content": "b"}])
    await refused(client, "body.input", input=[])
    assert "list of strings" in await refused(client, "body.input", input=3)
    assert "list of strings" in await refused(client, "body.input", input=["a", 1])
    await refused(client, "input", input=["a", "b", "c"])
    await refused(client, "input", input=[10**6])
    await refused(client, "input", input="", add_special_tokens=False)
    await refused(client, "input_tokens", input="a " * 70)
    await refused(client, "dimensions", input="a", dimensions=0)
    await refused(client, "body.encoding_format", input="a", encoding_format="hex")
    await refused(client, "embed_dtype", input="a", embed_dtype="float16")
    await refused(client, "truncate_prompt_tokens", input="a", truncate_prompt_tokens=10**6)
    assert (await post(client, status=404, input="a", model="x"))["error"]["param"] == "model"
    assert engine.submitted == []
    engine.refuse, engine.refuse_after = queue_full(), 1
    await post(client, status=429, input=["a", "b"])
    assert [s.aborts for s in engine.streams] == [1]


async def test_unknown_fields_are_named(client):
    response = await client.post(URL, json={"input": "a", "colour": "red", "user": "me"})
    assert "colour" in response.headers["x-quire-warnings"]
    assert response.json()["warnings"] == ["unknown field colour was ignored"]


async def test_all_end_when_the_client_leaves(client, engine):
    engine.hold()
    asking = asyncio.create_task(client.post(URL, json={"input": ["a", "b"]}))
    while len(engine.streams) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert [s.aborts for s in engine.streams] == [1, 1]
    assert len(client.state.live) == 0


async def test_an_engine_without_a_vector_is_an_error_not_an_answer(client, engine):
    engine.embed = lambda prompt, params: None
    assert (await post(client, status=499, input="a"))["error"]["type"] == "Error"
    engine.fail_at = 0
    body = await post(client, status=500, input="a")
    assert "secret" not in body["error"]["message"]


def strict(kind: type, data: dict, ours: set[str]) -> None:
    """Types hold strictly, and nothing is there that neither OpenAI nor we document."""
    kind.model_validate(data, strict=True)
    assert set(data) - set(kind.model_fields) <= ours


async def test_openais_client_reads_it(client, engine):
    body = await post(client, input=["a", "b"])
    strict(CreateEmbeddingResponse, body, {"id", "created", "warnings"})
    strict(Embedding, body["data"][0], set())
    sdk = openai.AsyncOpenAI(base_url="http://test/v1", api_key="k", http_client=client)
    made = await sdk.embeddings.create(model="tiny", input="a b a")  # asks for base64, reads it
    submitted = engine.submitted[-1]
    expected = engine.embed(submitted.prompt, submitted.params)
    assert made.data[0].embedding == pytest.approx(expected, abs=1e-7)
    known = set(EmbeddingRequest.model_fields) | unsupported.NO_EFFECT
    assert set(EmbeddingCreateParams.__annotations__) <= known
