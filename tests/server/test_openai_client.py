"""The real thing: `quire serve` on the built-in model, asked by the official `openai` client.

The model's words do not matter here and nothing depends on them; that they are the same however
they are asked for does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as ChatCreateParams,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as CompletionCreateParams,
)
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from scripted_engine import data_lines

from quire.server import unsupported
from quire.server.requests import ChatCompletionRequest, CompletionRequest

pytestmark = pytest.mark.timeout(240)

SOURCE = Path(__file__).resolve().parents[2] / "src"
KEY = "test-key"
START_SECONDS = 120.0
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
OURS = {
    "stop_reason", "token_ids", "prompt_token_ids", "warnings",
    "id", "created", "completion_tokens", "prompt_tokens_details",  # an embedding's, as in vLLM
}  # fmt: skip
"""Fields beyond OpenAI's."""


class Server:
    """`quire serve` in a process of its own."""

    def __init__(self, *flags: str) -> None:
        paths = [str(SOURCE), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "QUIRE_API_KEY": KEY,
        }
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "quire", "serve", "--host", "127.0.0.1", "--port", "0",
                "--kv-cache-memory-bytes", "64M", "--shutdown-timeout", "10", *flags,
            ],
            env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.log: list[str] = []
        self._url = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._url.wait(START_SECONDS), self.text()
        self.http = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60
        )
        deadline = time.monotonic() + START_SECONDS
        while self.http.get("/ready").status_code != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r'listening on (http[^\s"]+)', line)
            if found:
                self.url = found.group(1)
                self._url.set()

    def text(self) -> str:
        return "".join(self.log)

    def metrics(self) -> dict[str, float]:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return {
            sample.name: sample.value
            for family in families
            for sample in family.samples
            if family.name.startswith("vllm:") and not sample.name.endswith("_bucket")
            and set(sample.labels) == {"model_name", "engine"}
        }  # fmt: skip

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join()
        self.process.stderr.close()
        if hasattr(self, "http"):
            self.http.close()
            self.client.close()


@pytest.fixture(scope="module")
def server():
    running = Server()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client


def conforms(kind: type[BaseModel], raw: dict) -> BaseModel:
    """`raw` as the SDK's type, strictly: the client itself accepts nearly anything."""
    parsed = kind.model_validate_json(json.dumps(raw), strict=True)
    unknown = set(_unknown(parsed))
    assert unknown <= OURS, unknown
    return parsed


def _unknown(model: BaseModel):
    yield from (model.model_extra or {})
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                yield from _unknown(item)


def greedy(**fields) -> dict:
    return {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}, **fields}


# --- conformance ----------------------------------------------------------------------------------


def test_models(client):
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    assert isinstance(model, Model) and model.model_extra["max_model_len"] > 0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 3}, {"n": 2}])
def test_chat(client, extra):
    body = {"model": "quire-builtin", "messages": QUESTION, "max_tokens": 6, "seed": 1, **extra}
    raw = client.chat.completions.with_raw_response.create(**body)
    answer = conforms(ChatCompletion, json.loads(raw.content))
    assert len(answer.choices) == extra.get("n", 1)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    if "logprobs" in extra:
        content = answer.choices[0].logprobs.content
        assert len(content) == answer.usage.completion_tokens
        assert all(len(entry.top_logprobs) == 3 for entry in content)
        assert all(entry.logprob <= 0 for entry in content)


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"echo": True}, {"n": 2}])
def test_completions(client, extra):
    body = {"model": "quire-builtin", "prompt": ["The", "A list"], "max_tokens": 6, "seed": 1}
    raw = client.completions.with_raw_response.create(**body, **extra)
    answer = conforms(Completion, json.loads(raw.content))
    assert len(answer.choices) == 2 * extra.get("n", 1)
    if "echo" in extra:
        assert answer.choices[1].text.startswith("A list")


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/chat/completions", ChatCompletionChunk, {"messages": QUESTION, "logprobs": True}),
        ("/v1/chat/completions", ChatCompletionChunk, {"messages": QUESTION, "n": 2, "seed": 1}),
        ("/v1/completions", Completion, {"prompt": "The", "logprobs": 1}),
    ],
)
def test_every_event_conforms(server, path, kind, body):
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
    response = server.http.post(path, json={**body, **options})
    lines = data_lines(response.content)
    assert lines[-1] == "[DONE]"
    raw = [json.loads(line) for line in lines[:-1]]
    finished = [c["index"] for e in raw for c in e["choices"] if c["finish_reason"] is not None]
    assert sorted(finished) == list(range(body.get("n", 1)))
    if kind is Completion:  # OpenAI streams null here too; the SDK's type forgot
        for choice in (c for e in raw for c in e["choices"]):
            choice["finish_reason"] = choice["finish_reason"] or "stop"
    events = [conforms(kind, event) for event in raw]
    assert events[-1].choices == [] and events[-1].usage.completion_tokens > 0


def test_every_request_field_of_the_client_is_known():
    """Used, refused by name, or known to have no effect here: none falls through unseen."""
    for params, model, refused in (
        (CompletionCreateParams, CompletionRequest, unsupported.COMPLETION),
        (ChatCreateParams, ChatCompletionRequest, unsupported.CHAT),
    ):
        theirs = set(params.__annotations__)
        ours = set(model.model_fields) | set(refused) | unsupported.NO_EFFECT | unsupported.UNREAD
        assert theirs <= ours, theirs - ours


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "kind": {"enum": ["x", "y"]}},
                "required": ["a", "kind"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("add", "remove")
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_forced_calls_match_their_schema_streamed_and_whole(client, choice):
    body = {
        "model": "quire-builtin", "messages": QUESTION, "tools": TOOLS, "tool_choice": choice,
        "parallel_tool_calls": False, "max_tokens": 200, "n": 3, "seed": 5,
    }  # fmt: skip
    raw = client.chat.completions.with_raw_response.create(**body)
    answer = conforms(ChatCompletion, json.loads(raw.content))
    calls = {}
    for choice in answer.choices:
        [call] = choice.message.tool_calls
        calls[choice.index] = [call.function.name, call.function.arguments]
        if choice.finish_reason == "tool_calls":  # and not cut off in a long number
            arguments = json.loads(call.function.arguments)
            assert isinstance(arguments.pop("a"), int) and arguments.pop("kind") in ("x", "y")
            assert arguments == {}
    assert any(choice.finish_reason == "tool_calls" for choice in answer.choices)
    streamed = {index: ["", ""] for index in calls}
    with client.chat.completions.create(**body, stream=True) as chunks:
        for chunk in chunks:
            conforms(ChatCompletionChunk, chunk.model_dump(exclude_unset=True))
            for choice in chunk.choices:
                for call in choice.delta.tool_calls or []:
                    streamed[choice.index][0] += call.function.name or ""
                    streamed[choice.index][1] += call.function.arguments
    assert streamed == calls


POINTERS = {
    "into properties": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"$ref": "#/properties/a"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "recursive": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/node"}},
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"$ref": "#/$defs/node"}},
                "additionalProperties": False,
            }
        },
        "required": ["a"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("name", POINTERS)
@pytest.mark.parametrize("place", ["tool", "strict tool", "format"])
def test_schemas_that_point_into_themselves(client, name, place):
    schema = POINTERS[name]
    body = {"model": "quire-builtin", "messages": QUESTION, "max_tokens": 200, "seed": 5}
    if place == "format":
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        body["response_format"] = form
    else:
        function = {"name": "f", "parameters": schema, "strict": place == "strict tool"}
        body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        body |= {"parallel_tool_calls": False}
    choice = client.chat.completions.create(**body).choices[0]
    calls = choice.message.tool_calls
    text = calls[0].function.arguments if calls else choice.message.content
    if choice.finish_reason != "length":
        found = json.loads(text)
        assert found.keys() == set(schema["required"])
        assert name == "recursive" or set(found.values()) <= {1, 2}


def test_prompts_that_end_inside_a_character(client, server):
    """What the prompt began is shown with the prompt, and an answer begins with a character of its own."""
    ids = server.http.post("/tokenize", json={"prompt": "日本"}).json()["tokens"]
    assert len(ids) == 6
    for end in range(1, 7):
        body = {"model": "quire-builtin", "prompt": ids[:end], "max_tokens": 4, "temperature": 0}
        whole = client.completions.create(**body, logprobs=1).choices[0]
        with client.completions.create(**body, stream=True) as chunks:
            assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
        echoed = client.completions.create(**body, echo=True, logprobs=1).choices[0]
        assert echoed.text.endswith(whole.text) and len(echoed.text) > len(whole.text)
        assert len(echoed.logprobs.tokens) == end + len(whole.logprobs.tokens)


def test_errors_are_the_clients_exceptions(client):
    bad = [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
        ({"model": "nope"}, openai.NotFoundError, "model"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, openai.BadRequestError,
         "input_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url":
          {"url": "data:,"}}]}]}, openai.BadRequestError, "messages"),
    ]  # fmt: skip
    for fields, kind, param in bad:
        body = {"model": "quire-builtin", "messages": QUESTION, **fields}
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**body)
        assert caught.value.body["param"] == param, fields
        assert caught.value.request_id
    with openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


# --- vectors, and the operator's side -------------------------------------------------------------


def test_embeddings(client):
    texts = ["os.path.join", "a list of strings", "os.path.join"]
    raw = client.embeddings.with_raw_response.create(
        model="quire-builtin", input=texts, encoding_format="float", extra_body={"pooling": "mean"}
    )
    answer = conforms(CreateEmbeddingResponse, json.loads(raw.content))
    vectors = [item.embedding for item in answer.data]
    assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-3) for vector in vectors)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-3) and vectors[0] != vectors[1]
    for text, vector in zip(
        texts, vectors, strict=True
    ):  # in base64, which the client asks for itself
        [alone] = client.embeddings.create(
            model="quire-builtin", input=text, extra_body={"pooling": "mean"}
        ).data
        assert alone.embedding == pytest.approx(vector, abs=1e-3)
    ranked = client.post(
        "/rerank", body={"query": texts[0], "documents": texts[1:]}, cast_to=object
    )
    assert [result["index"] for result in ranked["results"]] == [1, 0]
    assert ranked["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-3)
    for fields in ({"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 7}):
        made = client.embeddings.create(
            model="quire-builtin", input=["word " * 5000, "a"], extra_body=fields
        )
        assert len(made.data) == 2
        limit = fields["truncate_prompt_tokens"]
        [model] = client.models.list().data
        most = model.model_extra["max_model_len"] if limit == -1 else limit
        assert most < made.usage.prompt_tokens <= most + 2
    with pytest.raises(openai.BadRequestError, match="context"):
        client.embeddings.create(model="quire-builtin", input="word " * 5000)
    with pytest.raises(openai.BadRequestError, match="vectors have"):
        client.embeddings.create(model="quire-builtin", input="a", dimensions=10**6)


def test_a_stream_is_aborted_by_its_id(server):
    """On a busy machine all tokens may be sent before the client reads one. Then it asks again."""
    body = {"prompt": "The", "stream": True, "max_tokens": 1500, "ignore_eos": True}
    reason, deadline = "length", time.monotonic() + 120
    while reason == "length":
        assert time.monotonic() < deadline
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            answer = json.loads(next(lines).removeprefix("data: "))["id"]
            asked = server.http.post("/abort_requests", json={"request_ids": [answer, "cmpl-x"]})
            chunks = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert chunks[-1] == "[DONE]"
        reason = json.loads(chunks[-2])["choices"][0]["finish_reason"]
    assert reason == "abort" and asked.json() == {"aborted": [answer]} and len(chunks) < 1500
    while server.http.get("/load").json() != {"server_load": 0}:
        assert time.monotonic() < deadline


# --- same tokens ----------------------------------------------------------------------------------


def test_stream_is_the_whole(client):
    body = greedy(model="quire-builtin", messages=QUESTION)
    whole = client.chat.completions.create(**body).choices[0].message.content
    with client.chat.completions.create(**body, stream=True) as chunks:
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole


def test_eight_at_once_get_what_each_gets_alone(client):
    questions = [f"What is module number {i} for?" for i in range(8)]

    def ask(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        body = greedy(model="quire-builtin", messages=messages, stream=True)
        with client.chat.completions.create(**body) as chunks:
            return "".join(c.choices[0].delta.content or "" for c in chunks)

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, questions)) == alone


def test_second_time_is_cached(client):
    text = "A prompt that is long enough to fill a block or two of the cache. " * 3
    body = greedy(model="quire-builtin", prompt=text)
    first, second = (client.completions.create(**body) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert second.usage.prompt_tokens_details.cached_tokens > 0


def test_chat_is_its_template_tokenized(server):
    ids = server.http.post("/tokenize", json={"messages": QUESTION}).json()
    text = server.http.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"]
    assert QUESTION[0]["content"] in text
    body = {"messages": QUESTION, "max_tokens": 1, "return_token_ids": True}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["prompt_token_ids"] == ids["tokens"]
    assert answer["usage"]["prompt_tokens"] == ids["count"]


# --- metrics --------------------------------------------------------------------------------------


def test_counting_rules_of_vllms_own_test(server, client):
    """As vLLM's own test counts: k serial requests of P prompt and G generated tokens."""
    k, length, prompt = 3, 10, list(range(300, 340))
    before = server.metrics()
    for _ in range(k):
        client.completions.create(**greedy(model="quire-builtin", prompt=prompt, max_tokens=length))
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:inter_token_latency_seconds_count"] == k * (length - 1)
    assert grown["vllm:iteration_tokens_total_sum"] == k * (len(prompt) + length)
    assert grown["vllm:iteration_tokens_total_count"] == k * length
    assert grown["vllm:request_params_max_tokens_sum"] == k * length
    assert grown["vllm:prompt_tokens_total"] == k * len(prompt)
    assert grown["vllm:generation_tokens_total"] == k * length
    for name in (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
        "request_params_n", "request_params_max_tokens", "request_num_preemptions",
    ):  # fmt: skip
        assert grown[f"vllm:{name}_count"] == k, name


def test_nothing_is_left_after_a_client_leaves(server):
    body = {
        "messages": QUESTION, "stream": True, "max_tokens": 1500, "ignore_eos": True,
        "temperature": 0,
    }  # fmt: skip
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    idle = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline = time.monotonic() + 10
    while any(server.metrics()[f"vllm:{name}"] for name in idle):
        assert time.monotonic() < deadline, server.metrics()
        time.sleep(0.05)


# --- an end ---------------------------------------------------------------------------------------


def test_sigterm_lets_the_answer_finish(server_factory):
    server = server_factory()
    body = greedy(model="quire-builtin", messages=QUESTION, max_tokens=300, stream=True)
    with server.client.chat.completions.create(**body) as chunks:
        next(iter(chunks))
        server.process.send_signal(signal.SIGTERM)
        reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons[-1] == "length"
    assert server.process.wait(20) == 0, server.text()


def test_a_killed_core_ends_requests_and_the_server(server_factory):
    server = server_factory("--max-core-deaths", "1")
    [core] = [
        child for child in psutil.Process(server.process.pid).children(recursive=True)
        if "core_process" in " ".join(child.cmdline())
    ]  # fmt: skip
    body = greedy(model="quire-builtin", messages=QUESTION, max_tokens=1500, stream=True)
    with server.client.chat.completions.create(**body) as chunks:
        next(iter(chunks))
        core.kill()
        with pytest.raises(openai.APIError):
            for _ in chunks:
                pass
    assert server.process.wait(20) == 1, server.text()


@pytest.fixture
def server_factory():
    made: list[Server] = []

    def make(*flags: str) -> Server:
        made.append(Server(*flags))
        return made[-1]

    yield make
    for server in made:
        server.stop()
