"""/v1/completions: shapes, prompts, streams."""

from __future__ import annotations

import itertools
import json

import pytest
from scripted_engine import ANSWER, ScriptedEngine, data_lines, texts

from quire.placement import Placement
from quire.sampling_params import RequestOutputKind

URL = "/v1/completions"
TEXT = "".join(ANSWER)


async def stream(client, **body) -> list[dict]:
    response = await client.post(URL, json={"prompt": "a b", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    lines = data_lines(response.content)
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_whole_answer(client, engine):
    response = await client.post(URL, json={"model": "tiny", "prompt": "a b", "max_tokens": 5})
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop",
             "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }  # fmt: skip
    assert engine.submitted[0].params.output_kind is RequestOutputKind.FINAL_ONLY


async def test_stream_is_the_whole_answer_in_pieces(client, engine):
    chunks = await stream(client)
    assert texts(chunks) == {0: TEXT}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert engine.submitted[0].params.output_kind is RequestOutputKind.DELTA


async def test_usage_chunk_comes_last_with_no_choices(client):
    chunks = await stream(client, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, stream_options=options)
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a b", [[1, 2, 3]]),
        (["a b", "a"], [[1, 2, 3], [1, 3]]),
        ([7, 8], [[7, 8]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
    ],
)
async def test_prompt_forms(client, engine, prompt, ids):
    engine.model.tokenizer.words += ["a ", "b"]
    if prompt == ["a b", "a"]:
        ids = [[1, 2, 3], [1, 4]]
    response = await client.post(URL, json={"prompt": prompt})
    assert response.status_code == 200
    assert [s.prompt for s in engine.submitted] == ids
    assert [c["index"] for c in response.json()["choices"]] == list(range(len(ids)))
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("streamed", [False, True])
async def test_prompts_times_n_have_their_own_index(client, engine, streamed):
    body = {"prompt": ["a", "b"], "n": 3, "temperature": 1.0}
    if streamed:
        assert texts(await stream(client, **body)) == dict.fromkeys(range(6), TEXT)
    else:
        choices = (await client.post(URL, json=body)).json()["choices"]
        assert [(c["index"], c["text"]) for c in choices] == [(i, TEXT) for i in range(6)]
    assert len({s.request_id for s in engine.submitted}) == 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_echo(client, streamed):
    if streamed:
        assert texts(await stream(client, prompt=["a b", "c"], echo=True)) == {
            0: "a b" + TEXT, 1: "c" + TEXT,
        }  # fmt: skip
    else:
        body = (await client.post(URL, json={"prompt": "a b", "echo": True})).json()
        assert body["choices"][0]["text"] == "a b" + TEXT


async def test_echo_of_ids_is_their_text(client, engine):
    ids = engine.model.tokenizer.encode("x y", add_special_tokens=False)
    body = (await client.post(URL, json={"prompt": ids, "echo": True})).json()
    assert body["choices"][0]["text"] == "x y" + TEXT


async def test_echo_with_logprobs_puts_the_prompts_in_front(client, engine):
    body = {"prompt": "a b", "echo": True, "logprobs": 1, "max_tokens": 1}
    answer = (await client.post(URL, json=body)).json()
    [choice] = answer["choices"]
    assert choice["text"] == "a bHello"
    assert "prompt_logprobs" not in choice, "nobody asked for them by that name"
    assert choice["logprobs"] == {
        "tokens": ["<bos>", "a ", "b", "Hello"],
        "token_logprobs": [None, -0.7, -0.7, -0.7],
        "top_logprobs": [None, *({t: -0.7, "<eos>": -0.1} for t in ("a ", "b", "Hello"))],
        "text_offset": [0, 0, 2, 3],
    }
    text, offsets = choice["text"], [*choice["logprobs"]["text_offset"], len(choice["text"])]
    assert [text[i:j] for i, j in itertools.pairwise(offsets)] == ["", "a ", "b", "Hello"]
    assert engine.submitted[0].params.prompt_logprobs == 1


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
async def test_echo_alone_generates_nothing(client, engine, streamed, logprobs):
    ids = engine.model.tokenizer.encode("x y", add_special_tokens=False)
    body = {"prompt": ids, "echo": True, "max_tokens": 0, "logprobs": logprobs}
    if streamed:
        [answer] = await stream(client, **body)
    else:
        answer = (await client.post(URL, json=body)).json()
        assert answer["usage"]["completion_tokens"] == 0
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("x y", "length")
    if logprobs is None:
        assert choice["logprobs"] is None
    else:
        assert choice["logprobs"]["tokens"] == ["x ", "y"]
        assert choice["logprobs"]["token_logprobs"] == [None, -0.7]


async def test_streamed_echo_adds_up_to_the_whole(client):
    body = {"prompt": ["a b", "c"], "echo": True, "logprobs": 2, "n": 2}
    whole = (await client.post(URL, json=body)).json()["choices"]
    merged: list[dict] = [{} for _ in whole]
    for chunk in await stream(client, **body):
        for choice in chunk["choices"]:
            for key, values in choice["logprobs"].items():
                merged[choice["index"]].setdefault(key, []).extend(values)
    assert merged == [choice["logprobs"] for choice in whole]


async def test_prompt_logprobs_in_vllms_shape(client, engine):
    body = {"prompt": ["a b", "c"], "prompt_logprobs": 3}
    choices = (await client.post(URL, json=body)).json()["choices"]
    token = str(engine.model.tokenizer.id("a "))
    first, entry, _ = choices[0]["prompt_logprobs"]
    assert first is None
    assert entry[token] == {"logprob": -0.7, "rank": 2, "decoded_token": "a "}
    assert entry["1"]["logprob"] == -9999.0, "JSON has no infinity"
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [3, 2]


async def test_logprobs_of_tokens_that_were_asked_for(client, engine):
    body = {"prompt": "a", "logprobs": 0, "logprob_token_ids": [0], "max_tokens": 1}
    [top] = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]["top_logprobs"]
    assert top == {"Hello": -0.7, "<eos>": -0.1}


async def test_two_tokens_with_one_text(engine):
    """The chosen token's value stands under its text, whatever else reads the same."""
    from quire.outputs import Logprob
    from quire.server.logprobs import LogprobFormatter

    engine.model.tokenizer.words += ["same", "same"]
    position = {2: Logprob(-0.1, 1), 3: Logprob(-2.0, 2), 0: Logprob(-3.0, 3)}
    formatter = LogprobFormatter(engine.model.tokenizer, top=3, as_ids=False)
    shaped, _ = formatter.completion([3, 2], [position, position], 0)
    assert shaped.token_logprobs == [-2.0, -0.1]
    assert shaped.top_logprobs == [{"same": -2.0, "<eos>": -3.0}, {"same": -0.1, "<eos>": -3.0}]


async def test_logprobs(client, engine):
    body = (await client.post(URL, json={"prompt": "a", "logprobs": 1, "max_tokens": 2})).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs == {
        "text_offset": [0, 5],
        "token_logprobs": [-0.7, -0.7],
        "tokens": ["Hello", " there"],
        "top_logprobs": [{"Hello": -0.7, "<eos>": -0.1}, {" there": -0.7, "<eos>": -0.1}],
    }
    body = (await client.post(URL, json={"prompt": "a", "logprobs": 3, "max_tokens": 1})).json()
    assert body["choices"][0]["logprobs"]["top_logprobs"][0]["<bos>"] == -9999.0


async def test_streamed_logprobs_add_up_to_the_whole(client):
    whole = (await client.post(URL, json={"prompt": "a b", "logprobs": 2})).json()
    chunks = await stream(client, logprobs=2)
    merged: dict[str, list] = {}
    for chunk in chunks:
        for key, values in chunk["choices"][0]["logprobs"].items():
            merged.setdefault(key, []).extend(values)
    assert merged == whole["choices"][0]["logprobs"]


async def test_tokens_as_ids_and_token_ids(client, engine):
    body = (
        await client.post(
            URL,
            json={
                "prompt": [5, 6], "logprobs": 0, "max_tokens": 1,
                "return_tokens_as_token_ids": True, "return_token_ids": True,
            },
        )
    ).json()  # fmt: skip
    [choice] = body["choices"]
    token = engine.model.tokenizer.id("Hello")
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}"]
    assert choice["token_ids"] == [token] and choice["prompt_token_ids"] == [5, 6]


async def test_streamed_prompt_ids_come_once(client):
    chunks = await stream(client, return_token_ids=True, prompt=[5, 6])
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [5, 6]
    assert all("prompt_token_ids" not in c["choices"][0] for c in chunks[1:])


async def test_defaults_come_from_the_model_unless_asked(make_client, engine):
    engine.model.default_sampling = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 1000}
    client = make_client()
    await client.post(URL, json={"prompt": "a", "top_p": 0.5, "temperature": None})
    params = engine.submitted[0].params
    assert (params.temperature, params.top_p) == (0.2, 0.5)
    assert params.max_tokens == 64 - 2, "a default is shortened to fit, not refused"


async def test_max_tokens_default_is_16_and_asked_for_is_not_shortened(client, engine):
    await client.post(URL, json={"prompt": "a"})
    assert engine.submitted[0].params.max_tokens == 16
    response = await client.post(URL, json={"prompt": "a", "max_tokens": 64})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


async def test_fields_reach_the_engine(client, engine):
    sent = {
        "n": 2, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
        "temperature": 0.7, "top_p": 0.8, "top_k": 40, "min_p": 0.05, "seed": 7, "stop": ["x"],
        "stop_token_ids": [3], "ignore_eos": True, "min_tokens": 2, "max_tokens": 9,
        "skip_special_tokens": False, "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
    }  # fmt: skip
    response = await client.post(
        URL, json={"prompt": "a", "priority": -3, "cache_salt": "tenant", **sent}
    )
    assert response.status_code == 200, response.text
    [submitted] = engine.submitted
    assert {name: getattr(submitted.params, name) for name in sent} == sent
    assert submitted.placement == Placement(priority=-3, cache_salt="tenant")


async def test_truncation(client, engine):
    await client.post(URL, json={"prompt": list(range(2, 12)), "truncate_prompt_tokens": 3})
    assert engine.submitted[0].prompt == [9, 10, 11]
    side = {"truncate_prompt_tokens": 3, "truncation_side": "right"}
    await client.post(URL, json={"prompt": list(range(2, 12)), **side})
    assert engine.submitted[1].prompt == [2, 3, 4]
    await client.post(
        URL, json={"prompt": [5] * 100, "truncate_prompt_tokens": -1, "max_tokens": 1}
    )
    response = await client.post(URL, json={"prompt": "a", "truncate_prompt_tokens": 65})
    assert response.json()["error"]["param"] == "truncate_prompt_tokens"


async def test_long_text_is_tokenized_off_the_loop(client, engine):
    await client.post(URL, json={"prompt": "a"})
    await client.post(URL, json={"prompt": "a" * 20_000})
    short, long = engine.model.tokenizer.threads
    assert short == "MainThread" and long != "MainThread"


@pytest.mark.parametrize("streamed", [False, True])
async def test_nulls_and_unknown_fields(client, engine, streamed):
    body = {
        "prompt": "a", "n": None, "stop": None, "suffix": None, "logit_bias": None,
        "stream": streamed, "stream_options": None, "user": "me", "frobnicate": 1, "x\r\ny": 2,
    }  # fmt: skip
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    expected = ["unknown field frobnicate was ignored", "unknown field x??y was ignored"]
    assert response.headers["x-quire-warnings"] == "; ".join(expected)
    if streamed:
        chunks = [json.loads(line) for line in data_lines(response.content)[:-1]]
        assert [c.get("warnings") for c in chunks] == [expected] + [None] * 4
    else:
        assert response.json()["warnings"] == expected


async def test_no_warnings_without_cause(client):
    response = await client.post(URL, json={"prompt": "a"})
    assert "x-quire-warnings" not in response.headers and "warnings" not in response.json()


@pytest.mark.parametrize("streamed", [False, True])
async def test_all_prompts_or_none(client, engine: ScriptedEngine, streamed):
    from scripted_engine import queue_full

    engine.refuse, engine.refuse_after = queue_full(), 2
    response = await client.post(URL, json={"prompt": ["a", "b", "c"], "stream": streamed})
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert [s.aborts for s in engine.streams] == [1, 1]
