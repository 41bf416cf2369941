"""/v1/chat/completions: shapes, templates, streams."""

from __future__ import annotations

import json

import pytest
from scripted_engine import ANSWER, data_lines

URL = "/v1/chat/completions"
TEXT = "".join(ANSWER)
HI = [{"role": "user", "content": "hi"}]


async def post(client, **body):
    return await client.post(URL, json={"messages": HI, **body})


async def stream(client, **body) -> list[dict]:
    response = await post(client, stream=True, **body)
    assert response.status_code == 200, response.text
    lines = data_lines(response.content)
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_whole_answer(client, engine):
    body = (await post(client)).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    prompt = len(engine.submitted[0].prompt)
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None, "finish_reason": "stop", "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }  # fmt: skip


async def test_stream_role_content_finish_usage_done(client):
    chunks = await stream(client, stream_options={"include_usage": True})
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    deltas = [c["choices"][0]["delta"] for c in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1:-1] == [{"content": word} for word in ANSWER]
    assert deltas[-1] == {}
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert reasons == [None] * 6 + ["stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 5


async def test_stream_of_n_choices(client):
    chunks = await stream(client, n=2, temperature=1.0)
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in own) == TEXT
        assert own[-1]["finish_reason"] == "stop"


async def test_logprobs(client, engine):
    body = (await post(client, logprobs=True, top_logprobs=1, max_tokens=1)).json()
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "Hello", "logprob": -0.7, "bytes": list(b"Hello"),
                "top_logprobs": [
                    {"token": "<eos>", "logprob": -0.1, "bytes": list(b"<eos>")}
                ],
            }
        ]
    }  # fmt: skip
    body = (await post(client, logprobs=True, top_logprobs=3, max_tokens=1)).json()
    [entry] = body["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"][2]["logprob"] == -9999.0, "JSON has no infinity"
    body = (await post(client, logprobs=True)).json()
    assert all(entry["top_logprobs"] == [] for entry in body["choices"][0]["logprobs"]["content"])


async def test_max_tokens_default_is_the_rest_of_the_context(client, engine):
    await post(client)
    await post(client, max_tokens=3)
    await post(client, max_tokens=3, max_completion_tokens=4)
    assert [s.params.max_tokens for s in engine.submitted] == [None, 3, 4]


async def test_template_writes_the_special_tokens(client, engine):
    await post(client)
    assert 1 not in engine.submitted[0].prompt
    await post(client, add_special_tokens=True)
    assert engine.submitted[1].prompt[0] == 1


async def test_template_arguments(client, engine):
    template = engine.model.chat_template
    await post(client, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert template.calls[0] == {
        "enable_thinking": False, "reasoning_effort": "low", "add_generation_prompt": True,
    }  # fmt: skip
    for name in ("messages", "tools", "self", "add_generation_prompt"):
        response = await post(client, chat_template_kwargs={name: 1})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "chat_template_kwargs"


async def test_continue_final_message_keeps_the_speaker(client):
    messages = [*HI, {"role": "poet", "content": "Roses are"}]
    body = (await post(client, messages=messages, continue_final_message=True)).json()
    assert body["choices"][0]["message"]["role"] == "poet"
    response = await post(client, continue_final_message=True, add_generation_prompt=True)
    assert response.json()["error"]["param"] == "continue_final_message"


async def test_response_role(make_client):
    client = make_client(response_role="oracle")
    assert (await post(client)).json()["choices"][0]["message"]["role"] == "oracle"


async def test_messages_reach_the_template_without_nulls(client, engine):
    seen = []
    render = engine.model.chat_template.render
    engine.model.chat_template.render = lambda m, **k: seen.append(m) or render(m, **k)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "name": "ann", "tool_calls": None, "odd": 1}
    assert (await post(client, messages=[message])).status_code == 200
    assert seen == [[{"role": "user", "content": parts, "name": "ann"}]]


async def test_prompt_token_ids(client, engine):
    body = (await post(client, return_token_ids=True)).json()
    assert body["prompt_token_ids"] == engine.submitted[0].prompt
    assert len(body["choices"][0]["token_ids"]) == 5
    chunks = await stream(client, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == engine.submitted[1].prompt
    assert all("prompt_token_ids" not in c for c in chunks[1:])
    ids = [i for c in chunks for i in c["choices"][0].get("token_ids", [])]
    assert ids == body["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "body.messages"),
        ({"messages": "hi"}, "body.messages"),
        ({"messages": [{"content": "hi"}]}, "body.messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "body.messages.0.content"),
        ({"messages": [{"role": "villain", "content": "x"}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "logprobs"),
        ({"logprobs": 2}, "body.logprobs"),
    ],
)
async def test_bad_requests(client, engine, body, param):
    response = await post(client, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.submitted == []


async def test_model_without_template(make_client, engine):
    engine.model.chat_template = None
    response = await post(make_client())
    assert response.status_code == 400
    assert "chat template" in response.json()["error"]["message"]


async def test_tokens_without_text_make_no_chunk_unless_shown(client, engine):
    """Half a character, or text held back for a stop string: nothing to say yet."""
    engine.answer = ["", "x", "", ""]
    deltas = [c["choices"][0]["delta"] for c in await stream(client)]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "x"}, {}]
    with_ids = await stream(client, return_token_ids=True)
    assert len(with_ids) == 1 + 4 + 1
