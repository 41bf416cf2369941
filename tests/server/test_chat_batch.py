"""/v1/chat/completions/batch: each conversation's answer is the one it gets alone."""

from __future__ import annotations

import asyncio

from openai.types.chat import ChatCompletion

URL = "/v1/chat/completions/batch"


def says(*texts: str) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in texts]


async def post(client, status: int = 200, **body) -> dict:
    response = await client.post(URL, json=body)
    assert response.status_code == status, response.text
    return response.json()


async def test_choices_in_order_and_equal_to_those_alone(client, engine):
    conversations = says("one", "two words", "three")
    options = {"n": 2, "temperature": 0.5, "seed": 1, "logprobs": True, "return_token_ids": True}
    body = await post(client, model="tiny", messages=conversations, **options)
    ChatCompletion.model_validate(body, strict=True)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    prompts = [s.prompt for s in engine.submitted]
    alone = []
    for messages in conversations:
        response = await client.post("/v1/chat/completions", json={"messages": messages, **options})
        alone.append(response.json())
    assert [s.prompt for s in engine.submitted[3:]] == prompts
    assert [s.params for s in engine.submitted[3:]] == [s.params for s in engine.submitted[:3]]
    for index, choice in enumerate(body["choices"]):
        expected = alone[index // 2]["choices"][index % 2]
        assert choice.pop("prompt_token_ids") == alone[index // 2]["prompt_token_ids"]
        assert choice == expected | {"index": index}
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert body["usage"][name] == sum(answer["usage"][name] for answer in alone)
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"


async def test_refused(make_client, engine):
    client = make_client(max_prompts_per_request=2)
    for param, body in {
        "stream": {"messages": says("a"), "stream": True},
        "messages": {"messages": says("a", "b", "c")},
        "body.messages": {"messages": []},
        "body.messages.0": {"messages": says("a")[0]},
        "body.messages.1.0.role": {"messages": [*says("a"), [{"content": "x"}]]},
        "temperature": {"messages": says("a"), "temperature": 9},
    }.items():
        error = (await post(client, 400, **body))["error"]
        assert error["param"] == param, error
    assert engine.submitted == []


async def test_one_failure_ends_all(client, engine):
    engine.hold()
    asking = asyncio.create_task(client.post(URL, json={"messages": says("a", "b")}))
    while len(engine.streams) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    engine.die("gone")
    assert (await asking).status_code == 500
    assert all(stream.aborts for stream in engine.streams)
    assert len(client.state.live) == 0
