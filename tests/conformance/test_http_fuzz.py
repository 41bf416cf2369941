"""Every feature with every other, over HTTP: no 5xx, a stream is the whole, nothing is left behind."""

from __future__ import annotations

import copy
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from tests.conformance.live import builtin_engine, live_server
from tests.server.scripted_engine import data_lines

EXAMPLES = int(os.environ.get("QUIRE_FUZZ_EXAMPLES", "100")) // 4
VOCAB = 4096
TEXTS = ("def f(x):", "The list of", "a = [1, 2", "import os\n", "x " * 40, "héllo 🙂", "")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"enum": [1, 22]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": strict}}
    for name, strict in (("add", True), ("look_up", False))
]
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with live_server(builtin_engine) as client:
        yield client
        wait_idle(client)


def one_of(*values: object) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


token = st.integers(0, VOCAB - 1)
few_tokens = st.lists(token, min_size=1, max_size=6)
words = st.lists(st.text("aeiou t.(", min_size=1, max_size=2), min_size=1, max_size=3)
COMMON = {
    "temperature": one_of(0, 0.3, 1, 2), "n": one_of(1, 2, 3), "top_p": one_of(1, 0.9, 0.01),
    "top_k": one_of(-1, 0, 1, 7), "min_p": one_of(0, 0.2), "presence_penalty": one_of(-2, 0.5),
    "frequency_penalty": one_of(1.5), "repetition_penalty": one_of(1.3), "stop": words,
    "stop_token_ids": few_tokens, "min_tokens": one_of(0, 1, 3), "ignore_eos": one_of(True),
    "logit_bias": st.dictionaries(token.map(str), st.floats(-100, 100), max_size=3),
    "allowed_token_ids": few_tokens | st.just(list(range(20, 120))), "bad_words": words,
    "skip_special_tokens": one_of(False), "spaces_between_special_tokens": one_of(False),
    "include_stop_str_in_output": one_of(True), "skip_reading_prefix_cache": one_of(True),
    "repetition_detection": one_of({"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 2}),
    "thinking_token_budget": one_of(0, 3), "priority": one_of(-1, 5), "cache_salt": one_of("s"),
    "truncate_prompt_tokens": one_of(-1, 1, 4), "truncation_side": one_of("left", "right"),
    "stream_interval": one_of(1, 4), "return_tokens_as_token_ids": one_of(True),
    "prompt_logprobs": one_of(0, 2), "prompt_logprob_start": one_of(0, 2),
    "logprob_token_ids": few_tokens, "return_effective_params": one_of(True),
    "return_prefix_details": one_of(True),
    "response_format": one_of(
        {"type": "text"}, {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
    ),
    "use_beam_search": one_of(True), "length_penalty": one_of(0.5, 1),
    "structured_outputs": one_of(
        {"regex": "(ab|cd){2,4}[0-9]?"}, {"choice": ["yes", "no", "né"]}, {"json": SCHEMA},
        {"grammar": 'start: "x" ("y" | "zz")+ "."'},
    ),
}  # fmt: skip
COMPLETION = COMMON | {"logprobs": one_of(0, 1, 5), "echo": one_of(True)}
CHAT = COMMON | {
    "logprobs": one_of(True), "top_logprobs": one_of(0, 3), "tools": one_of(TOOLS, TOOLS[:1]),
    "tool_choice": one_of("auto", "none", "required", NAMED), "include_reasoning": one_of(False),
    "parallel_tool_calls": one_of(False), "add_generation_prompt": one_of(False),
    "continue_final_message": one_of(True), "reasoning_effort": one_of("low"),
    "add_special_tokens": one_of(True),
}  # fmt: skip
PROMPTS = (
    one_of(*TEXTS)
    | st.lists(one_of(*TEXTS), min_size=1, max_size=3)
    | st.lists(token, min_size=1, max_size=50)
    | st.lists(st.lists(token, min_size=1, max_size=20), min_size=1, max_size=3)
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": one_of("user", "assistant"), "content": one_of(*TEXTS)}),
    min_size=1, max_size=3,
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path and a body: a few fields beyond the needed ones, each with a value that it may have."""
    chat = draw(st.booleans())
    fields = CHAT if chat else COMPLETION
    names = draw(st.lists(one_of(*fields), max_size=6, unique=True))
    body: dict[str, Any] = {name: draw(fields[name]) for name in names}
    body |= {"seed": draw(st.integers(0, 9)), "max_tokens": draw(st.integers(1, 20))}
    body["return_token_ids"] = True
    if chat:
        return "/v1/chat/completions", body | {"messages": draw(MESSAGES)}
    if body.get("echo"):
        body.pop("prompt_logprobs", None)  # it would win over what an echo shows, as in vLLM
        body["max_tokens"] *= draw(st.integers(0, 1))
    return "/v1/completions", body | {"prompt": draw(PROMPTS)}


seen: Counter[int] = Counter()


@settings(
    max_examples=max(1, EXAMPLES), deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.lists(requests(), min_size=1, max_size=4), st.integers(0, 4))
def test_a_stream_is_the_whole_whatever_is_asked_for(server, asked, leaver):
    """All at once, so that they share steps; one client may leave in the middle."""
    with ThreadPoolExecutor(9) as pool:
        wholes = [pool.submit(whole, server, path, body) for path, body in asked]
        streams = [pool.submit(streamed, server, path, body) for path, body in asked]
        if leaver < len(asked):
            pool.submit(leave, server, *asked[leaver]).result()
        for (path, body), a, b in zip(asked, wholes, streams, strict=True):
            compare(path, body, a.result(), b.result())


def test_many_of_them_were_answered():
    """The last test looked at answers, not at refusals."""
    assert seen[200] > 0.3 * seen.total() or seen.total() == 0, seen


def compare(path, body, whole, stream) -> None:
    seen[whole.status_code] += 1
    assert whole.status_code in (200, 400), whole.text
    if whole.status_code == 400:
        if body.get("prompt_logprobs") is None:
            assert stream == whole.json()["error"]
        return
    answer = whole.json()
    assert_typed(ChatCompletion if "messages" in body else Completion, answer)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    completed = sum(len(choice["token_ids"]) for choice in answer["choices"])
    assert usage["completion_tokens"] == completed
    numbers = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [stream["usage"][name] for name in numbers] == [usage[name] for name in numbers]
    prompts = body.get("prompt", "")
    many = isinstance(prompts, list) and not isinstance(prompts[0], int)
    count = (len(prompts) if many else 1) * body.get("n", 1)
    assert [choice["index"] for choice in answer["choices"]] == list(range(count))
    for choice in answer["choices"]:
        assert parts(choice) == stream["choices"][choice["index"]], body
        if body.get("echo") is None and not body.get("tools"):
            assert len(choice["token_ids"]) <= body["max_tokens"]


def assert_typed(kind: type[BaseModel], answer: dict[str, Any]) -> None:
    """As the openai client's types have it, strictly. They forgot that a completion's stream has null for
    finish_reason until the end, and an echo for the first token's logprob, as OpenAI's have; and whose turn
    is continued they do not know."""
    answer = copy.deepcopy(answer)
    for choice in answer["choices"]:
        message = choice.get("message") or choice.get("delta") or {}
        if choice["finish_reason"] == "repetition":  # vLLM's, only for who asks for it
            choice["finish_reason"] = "stop"
        if message.get("role") == "user":
            message["role"] = "assistant"
    for choice in answer["choices"] if kind is Completion else ():
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for name, nothing in (("token_logprobs", 0.0), ("top_logprobs", {})):
            values = (choice["logprobs"] or {}).get(name)
            if values and values[0] is None:
                values[0] = nothing
    kind.model_validate_json(json.dumps(answer), strict=True)


def parts(choice: dict[str, Any]) -> dict[str, Any]:
    """What a choice says, however it was sent."""
    message = choice.get("message") or choice.get("delta") or {}
    calls: dict[int, list[str]] = {}
    for position, call in enumerate(message.get("tool_calls") or []):
        function = call["function"]
        index = call.get("index", position)
        calls[index] = [function.get("name") or "", function.get("arguments") or ""]
    logprobs = choice.get("logprobs") or {}
    return {
        "text": choice.get("text") or message.get("content") or "",
        "reasoning": message.get("reasoning_content") or message.get("reasoning") or "",
        "calls": calls,
        "token_ids": choice.get("token_ids") or [],
        "logprobs": {name: list(value) for name, value in logprobs.items() if value},
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice.get("stop_reason"),
    }


def joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two parts of one choice, in order."""
    calls = {index: list(call) for index, call in a["calls"].items()}
    for index, (name, arguments) in b["calls"].items():
        call = calls.setdefault(index, ["", ""])
        call[0] += name
        call[1] += arguments
    logprobs = {
        name: a["logprobs"].get(name, []) + b["logprobs"].get(name, [])
        for name in a["logprobs"] | b["logprobs"]
    }
    return {
        **{name: a[name] + b[name] for name in ("text", "reasoning", "token_ids")},
        "calls": calls,
        "logprobs": logprobs,
        "finish_reason": b["finish_reason"] or a["finish_reason"],
        "stop_reason": a["stop_reason"] if b["stop_reason"] is None else b["stop_reason"],
    }


def whole(server: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    return server.post(path, json=body)


def as_stream(body: dict[str, Any]) -> dict[str, Any]:
    options = {"include_usage": True, "continuous_usage_stats": body["seed"] % 2 == 0}
    rest = {name: value for name, value in body.items() if name != "prompt_logprobs"}
    return rest | {"stream": True, "stream_options": options}


def streamed(server: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = server.post(path, json=as_stream(body))
    if response.status_code != 200:
        return response.json()["error"]
    lines = data_lines(response.content)
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if "error" in chunk:
            return chunk["error"]
        assert_typed(ChatCompletionChunk if "messages" in body else Completion, chunk)
        for choice in chunk["choices"]:
            new = parts(choice)
            index = choice["index"]
            choices[index] = joined(choices[index], new) if index in choices else new
    return {"choices": choices, "usage": chunks[-1]["usage"]}


def leave(server: httpx.Client, path: str, body: dict[str, Any]) -> None:
    with server.stream("POST", path, json=as_stream(body)) as response:
        next(response.iter_raw(), None)


def wait_idle(server: httpx.Client) -> None:
    """Nothing runs, and no block is held."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "quire:kv_slots_allocated")
    deadline = time.monotonic() + 10
    while True:
        families = text_string_to_metric_families(server.get("/metrics").text)
        values = {
            family.name: family.samples[0].value for family in families if family.name in names
        }
        assert len(values) == len(names)
        if not any(values.values()):
            assert server.get("/load").json() == {"server_load": 0}
            return
        assert time.monotonic() < deadline, values
        time.sleep(0.05)
