"""No request, whatever it holds, ends in more than an error of its own: wrong kinds, absurd numbers, depth.

tests/conformance fuzzes valid and damaged bodies at live engines; this goes through every field of every
route."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.security.bodies import ALIASES, ALL, PROMPTED

from quire.config import EngineConfig, LoRAConfig

KINDS = (
    True, -1, 2**70, 1e308, "x", "\x00\ufffe", [[]], [None], [{}], {"": None}, {"a": {"b": [{}]}},
)  # fmt: skip


def fields_of(document: dict, path: str) -> list[str]:
    """The fields of all bodies that the route takes."""
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = content["schema"]
    names = set()
    for reference in schema.get("anyOf", [schema]):
        model = document["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
        names |= model["properties"].keys()
    return sorted(names)


@pytest.fixture
def everything(make_client):
    lora = EngineConfig(lora=LoRAConfig(enable_lora=True))
    return make_client(engine_config=lora, enable_admin_endpoints=True)


@pytest.mark.parametrize("path", [path for path in ALL if path not in ALIASES])
async def test_every_field_with_every_kind_of_value(everything, engine, path):
    document = (await everything.get("/openapi.json")).json()
    names = fields_of(document, path)
    assert len(names) >= (8 if path in PROMPTED else 1)
    for name in names:
        for value in KINDS:
            body = json.dumps(ALL[path] | {name: value}).encode()
            answer = await everything.post(
                path, content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code < 500, (name, value, answer.text)
            if answer.status_code >= 400 and "text/event-stream" not in str(answer.headers):
                assert answer.json()["error"]["message"], (name, value)
    async with asyncio.timeout(30):  # of /v1/responses, some run in the background
        while len(everything.state.live) or not all(stream.ended for stream in engine.streams):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", PROMPTED)
async def test_token_ids_outside_the_vocabulary_are_refused(client, engine, path):
    """Ids are checked against the width of the logits before a kernel sees them."""
    huge = engine.model.vocab_size
    for name, value in (
        ("prompt", [huge]), ("prompt", [[2, huge]]), ("input", [huge]), ("input", [[huge]]),
        ("logit_bias", {str(huge): 1}), ("allowed_token_ids", [huge]), ("stop_token_ids", [huge]),
        ("logprob_token_ids", [huge]), ("logit_bias", {"-1": 1}), ("allowed_token_ids", [-1]),
    ):  # fmt: skip
        before = len(engine.submitted)
        answer = await client.post(path, json=PROMPTED[path] | {name: value})
        if answer.status_code == 200:  # no such field here: it is named in a warning and not used
            for each in engine.submitted[before:]:
                assert huge not in each.prompt
                assert huge not in (getattr(each.params, name, None) or ())
        else:
            assert answer.status_code == 400, answer.text


async def test_detokenizing_ids_outside_the_vocabulary(client):
    for tokens in ([1000], [2**31], [2**40], [-1], [True], [[1]]):
        answer = await client.post("/detokenize", json={"tokens": tokens})
        assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize("path", [path for path in ALL if path not in ALIASES])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
async def test_depth_of_json_is_bounded(everything, path, opening):
    """The parser stops at its own depth; below that, nothing that walks a value overflows the stack."""
    closing = {"[": "]", '{"a":': "}"}[opening]
    for depth in (150, 100_000):
        nested = opening * depth + "1" + closing * depth
        for name in ("unknown", "metadata", "tools", "response_format", "chat_template_kwargs",
                     "structured_outputs", "logit_bias", "input", "messages", "prompt"):  # fmt: skip
            body = json.dumps(ALL[path] | {name: 0}).replace(f'"{name}": 0', f'"{name}": {nested}')
            answer = await everything.post(
                path, content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code < 500, (name, depth, answer.text[:300])
            assert depth < 200 or answer.status_code == 400, name
