"""`use_beam_search`: refused by name where it cannot be had, and over a real engine what `LLM` finds."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from openai import OpenAI

from quire import LLM, BeamSearchParams

PROMPT = "os.path.join"
BEAMS = {"use_beam_search": True, "n": 3, "max_tokens": 6}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["x"]}, "stop"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 5, "n": 2}, "logprobs"),
        ({"best_of": 2, "n": 3}, "n"),
        ({"n": 129}, "n"),
        ({"n": 65, "prompt": ["a", "b"]}, "n"),
        ({"length_penalty": 99.0}, "length_penalty"),
        ({"length_penalty": 2.0, "use_beam_search": False}, "length_penalty"),
        ({"best_of": 4, "use_beam_search": False}, "best_of"),
    ],
)
async def test_what_a_search_cannot_do_is_refused(client, engine, fields, param) -> None:
    body = {"prompt": "hello", **BEAMS, **fields}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.submitted == []


async def test_the_search_that_is_asked_for_reaches_the_engine(client, engine) -> None:
    chat = {
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "top_p": 0.5,
        "seed": 1,
    }
    engine.hold()
    asking = asyncio.ensure_future(
        client.post(
            "/v1/chat/completions",
            json={**BEAMS, **chat, "best_of": 5, "length_penalty": 0.5, "ignore_eos": True},
        )
    )
    while not engine.submitted:
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert engine.submitted[0].params == BeamSearchParams(
        5, 6, n=3, length_penalty=0.5, ignore_eos=True
    )


def test_a_server_finds_what_llm_finds(demo_server) -> None:
    with LLM() as llm:
        [expected] = llm.beam_search(PROMPT, BeamSearchParams(3, 6))
        size = len(llm.get_tokenizer().encode(PROMPT))
    ids = [beam.tokens[size:] for beam in expected.sequences]
    total = expected.sequences[0].cum_logprob
    extra = {"use_beam_search": True, "return_token_ids": True}
    with OpenAI(base_url=demo_server.url + "/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        whole = client.completions.create(
            model=model, prompt=PROMPT, n=3, max_tokens=6, logprobs=2, extra_body=extra
        )
        assert [choice.token_ids for choice in whole.choices] == ids
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        assert {choice.finish_reason for choice in whole.choices} <= {"length", "stop"}
        assert sum(whole.choices[0].logprobs.token_logprobs) == pytest.approx(total, abs=1e-4)
        assert whole.usage.completion_tokens == sum(map(len, ids))

        texts = {}
        for chunk in client.completions.create(
            model=model, prompt=PROMPT, n=3, max_tokens=6, stream=True, extra_body=extra
        ):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        assert [texts[i] for i in range(3)] == [choice.text for choice in whole.choices]

        two = client.completions.create(
            model=model, prompt=[PROMPT, "A list"], n=2, max_tokens=6,
            extra_body={**extra, "best_of": 3},
        )  # fmt: skip
        assert [choice.token_ids for choice in two.choices][:2] == ids[:2]
        assert [choice.index for choice in two.choices] == [0, 1, 2, 3]

        messages = [{"role": "user", "content": "hello"}]
        chat = client.chat.completions.create(
            model=model, messages=messages, n=2, max_tokens=6, extra_body=extra
        )
        assert [choice.index for choice in chat.choices] == [0, 1]
        assert chat.choices[0].message.content != chat.choices[1].message.content
        batch = httpx.post(
            demo_server.url + "/v1/chat/completions/batch",
            json={"messages": [messages, messages], "n": 2, "max_tokens": 6, **extra},
        )
        choices = json.loads(batch.text)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert [c["message"]["content"] for c in choices[:2]] == [
            choice.message.content for choice in chat.choices
        ]
