"""Prefill/decode disaggregation with real processes: the answers of one server, whatever fails meanwhile."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from pd_site import PDSite
from tests.kvtransfer.fault_proxy import TO_CLIENT, TO_SERVER, Fault, FaultProxy, proxied

from quire import LLM, SamplingParams

STORY = "Once upon a time there was a lighthouse keeper who counted ships. "
PROMPTS = [f"{number} " + STORY * (8 + number) for number in range(4)]
LEASE = 4.0
URL = "/v1/completions"
HOLD = {"do_remote_decode": True}


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    """One engine with everything."""
    llm = LLM(max_model_len=1024, kv_cache_memory_bytes=16 << 20)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[PDSite]:
    admin = {"enable_admin_endpoints": True}
    site = PDSite(tmp_path_factory.mktemp("pd"), prefill=admin, decode=admin, lease=LEASE)
    yield site
    site.close()


def expected(alone: LLM, prompt: str) -> tuple[str, list[float]]:
    [output] = alone.generate(
        prompt,
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1),
        use_tqdm=False,
    )
    part = output.outputs[0]
    assert part.logprobs is not None
    chosen = [part.logprobs[i][token].logprob for i, token in enumerate(part.token_ids)]
    return part.text, chosen


def test_the_answers_are_those_of_one_server(site: PDSite, alone: LLM) -> None:
    check_answers(site, alone)


def test_of_replicas_and_ranks_through_shared_memory(alone: LLM, tmp_path) -> None:
    """How ranks and stages are combined is proved in tests/engine/test_kv_peers.py."""
    site = PDSite(
        tmp_path,
        connector="SharedMemoryConnector",
        prefill={"data_parallel_size": 2},
        decode={"tensor_parallel_size": 2},
    )
    try:
        check_answers(site, alone)
    finally:
        site.close()


def check_answers(site: PDSite, alone: LLM) -> None:
    before = site.ways()
    with openai.OpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0) as client:
        for number, prompt in enumerate(PROMPTS):
            text, logprobs = expected(alone, prompt)
            body = {
                "model": "quire-builtin", "prompt": prompt, "max_tokens": 12, "temperature": 0,
                "logprobs": 1, "extra_body": {"ignore_eos": True},
            }  # fmt: skip
            if number % 2:
                chunks = list(client.completions.create(**body, stream=True))
                choices = [chunk.choices[0] for chunk in chunks]
            else:
                answer = client.completions.create(**body)
                choices = answer.choices
                assert answer.usage.prompt_tokens_details.cached_tokens >= 96
            assert "".join(choice.text for choice in choices) == text
            found = [p for c in choices if c.logprobs for p in c.logprobs.token_logprobs]
            assert found == logprobs  # the same bits
    assert site.ways() == before | {"prefill": before["prefill"] + len(PROMPTS)}


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3, "temperature": 1.0, "seed": 5},
        {"cache_salt": "mine"},
        {"prompt_logprobs": 1},
        {"echo": True, "logprobs": 1},
        {"structured_outputs": {"regex": "[a-z]{5}"}},
        {"stop": ["a"]},
        {"use_beam_search": True, "n": 2},
        {"frequency_penalty": 1.5, "min_tokens": 5, "logit_bias": {"100": 5}},
        {"prompt": [PROMPTS[0], PROMPTS[1]]},
        {"skip_reading_prefix_cache": True},
        {"prompt": "short"},
        {"truncate_prompt_tokens": 100},
    ],
    ids=str,
)
def test_whatever_is_asked_for(fields: dict[str, object], site: PDSite) -> None:
    body = {"prompt": str(fields) + PROMPTS[2], "max_tokens": 8, "temperature": 0, **fields}
    by_proxy, by_one = (
        httpx.post(url + URL, json=body, timeout=60).json() for url in (site.url, site.prefill.url)
    )
    assert by_proxy["choices"] == by_one["choices"]
    assert "warnings" not in by_proxy


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "temperature": 1.0, "seed": 7},
        {"logprobs": True, "top_logprobs": 3},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"max_completion_tokens": 5, "max_tokens": None},
    ],
    ids=lambda fields: " ".join(fields) if isinstance(fields, dict) else str(fields),
)
def test_a_client_of_openai(fields: dict[str, object], stream: bool, site: PDSite) -> None:
    before = site.ways()
    both = []
    for url in (site.url, site.prefill.url):
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            body = {
                "model": client.models.list().data[0].id, "max_tokens": 40, "temperature": 0,
                "messages": [{"role": "user", "content": f"{stream} {fields} {STORY * 6}"}],
                "stream": stream, **fields,
            }  # fmt: skip
            answer = client.chat.completions.create(**body)
            both.append(
                [list(map(plain, each.choices)) for each in (answer if stream else [answer])]
            )
    if stream:  # the text's division among chunks is a matter of time
        both = [joined(chunks) for chunks in both]
    assert both[0] == both[1]
    assert site.ways()["prefill"] == before["prefill"] + 1


def plain(choice: object) -> dict[str, object]:
    """Without ids, which are random."""
    found = choice.model_dump(exclude_none=True)  # type: ignore[attr-defined]
    for call in (found.get("message") or found["delta"]).get("tool_calls") or ():
        call.pop("id", None)
    return found


def joined(chunks: list[list[dict[str, object]]]) -> dict[int, list[object]]:
    """By choice: the text, the arguments of calls, the logprobs, the finish reason."""
    found: dict[int, list[object]] = {}
    for choice in (choice for chunk in chunks for choice in chunk):
        whole = found.setdefault(choice["index"], ["", "", [], None])
        delta = choice["delta"]
        whole[0] += delta.get("content") or ""
        whole[1] += "".join(
            call["function"].get("name", "") + call["function"]["arguments"]
            for call in delta.get("tool_calls", ())
        )
        whole[2] += (choice.get("logprobs") or {}).get("content") or []
        whole[3] = choice.get("finish_reason") or whole[3]
    return found


def test_a_conversation(site: PDSite) -> None:
    before = site.ways()
    messages: list[dict[str, str]] = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"{turn} {STORY * 5}"})
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        told, right = (
            httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()["choices"]
            for url in (site.url, site.prefill.url)
        )
        assert told == right
        messages.append(told[0]["message"])
    assert site.ways()["prefill"] == before["prefill"] + 3


def test_a_client_that_leaves(site: PDSite) -> None:
    for moment in range(3):
        body = {"prompt": f"{moment} leaves " + PROMPTS[3], "max_tokens": 700, "ignore_eos": True}
        with httpx.stream("POST", site.url + URL, json=body | {"stream": True}) as answer:
            for _ in zip(range(moment), answer.iter_raw(), strict=False):
                pass
    assert site.prefill.becomes_idle(LEASE + 5) and site.decode.becomes_idle(LEASE + 5)


@pytest.mark.parametrize("path", [URL, "/v1/chat/completions"])
def test_a_router_written_for_vllm(path: str, site: PDSite) -> None:
    """The steps of vLLM's own examples."""
    text = f"{path} router {STORY * 8}"
    asks = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    asks |= {"temperature": 0, "max_tokens": 9}
    right = httpx.post(site.prefill.url + path, json=asks, timeout=60).json()
    unknown = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
    hold = {"do_remote_decode": True, "do_remote_prefill": False} | dict.fromkeys(unknown)
    first = asks | {"kv_transfer_params": hold, "stream": False, "max_tokens": 1}
    params = httpx.post(site.prefill.url + path, json=first, timeout=60).json()[
        "kv_transfer_params"
    ]
    assert params["do_remote_prefill"] is True and {*unknown} <= params.keys()
    second = asks | {"kv_transfer_params": params, "stream": True}
    second["stream_options"] = {"include_usage": True}
    answer = httpx.post(site.decode.url + path, json=second, timeout=60).text
    *chunks, usage = [json.loads(line[6:]) for line in answer.split("\n\n") if "{" in line]
    parts = [chunk["choices"][0] for chunk in chunks]
    told = "".join(p["text"] if "text" in p else p["delta"].get("content") or "" for p in parts)
    [choice] = right["choices"]
    assert told == (choice["text"] if "text" in choice else choice["message"]["content"])
    details = usage["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == params["num_tokens"] // 16 * 16


class Tickets:
    """What P answers, and what D makes of it when somebody changes it."""

    def __init__(self, site: PDSite) -> None:
        self.site = site

    def params(self, prompt: str) -> dict[str, object]:
        body = {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": HOLD}
        return httpx.post(self.site.prefill.url + URL, json=body, timeout=60).json()[
            "kv_transfer_params"
        ]

    def answer(self, prompt: str, params: object) -> tuple[str, int]:
        """D's text, and the tokens that it did not compute. It has nothing in its cache before."""
        httpx.post(self.site.decode.url + "/reset_prefix_cache", timeout=60).raise_for_status()
        return self.ask(prompt, params)

    def ask(self, prompt: str, params: object) -> tuple[str, int]:
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(
            self.site.decode.url + URL, json=body | {"kv_transfer_params": params}, timeout=60
        ).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["text"], cached


def test_a_network_that_damages_what_it_carries(site: PDSite, alone: LLM) -> None:
    """What each byte and message does is proved in tests/kvtransfer/test_faults.py."""
    tickets, chosen = Tickets(site), random.Random(3)
    prompt = "A short one. " * 8  # a load may take a second
    text, _ = expected(alone, prompt)

    def through(fault: Fault | None = None) -> FaultProxy:
        params = tickets.params(prompt)
        with proxied(int(str(params["remote_port"])), fault) as proxy:
            place = {"remote_port": proxy.port, "remote_ports": None}
            told, cached = tickets.answer(prompt, params | place)
        assert told == text and proxy.num_connections, fault
        assert fault is not None or cached == int(str(params["num_tokens"])) // 16 * 16
        return proxy

    counts = through().counts
    for direction, messages in ((TO_CLIENT, 4), (TO_SERVER, 2)):
        for kind in ("flip", "cut", "flip"):
            through(Fault(direction, kind, chosen.randrange(counts[direction])))
        for kind in ("repeat", "swap", "grow", "shrink"):
            through(Fault(direction, kind, chosen.randrange(messages)))
        through(Fault(direction, "drop", 1))
        through(Fault(direction, "stall", counts[direction] // 2))
    assert site.decode.is_idle()  # P is looked at below


def test_tickets_that_are_used_forged_expired_or_of_another_prompt(
    site: PDSite, alone: LLM
) -> None:
    tickets = Tickets(site)
    prompt, other = PROMPTS[2], PROMPTS[3]
    text, _ = expected(alone, prompt)
    params = tickets.params(prompt)
    assert params["remote_block_ids"] == []
    assert tickets.answer(prompt, params) == (text, params["num_tokens"] // 16 * 16)
    assert tickets.answer(prompt, params) == (text, 0), "a ticket is valid once"
    params = tickets.params(prompt)
    forged = str(params["ticket"])
    forged = forged[:-1] + ("0" if forged[-1] != "0" else "1")
    for changes in (
        {"ticket": forged},
        {"ticket": "x"},
        {"remote_engine_id": "another"},
        {"remote_port": 1, "remote_ports": None},
        {"remote_host": "127.0.0.2"},
    ):
        assert tickets.answer(prompt, params | changes) == (text, 0), changes
    assert tickets.answer(other, params) == (expected(alone, other)[0], 0)
    assert tickets.answer(prompt, params | {"num_tokens": 10**9})[0] == text
    params = tickets.params(prompt)
    assert not site.prefill.is_idle()
    assert site.prefill.becomes_idle(LEASE + 5)
    assert tickets.answer(prompt, params) == (text, 0)
    assert site.prefill.becomes_idle(LEASE + 5) and site.decode.is_idle()


class Caller(threading.Thread):
    """Asks again and again, and keeps what came of it."""

    def __init__(self, url: str, answers: dict[str, str], number: int) -> None:
        super().__init__(daemon=True)
        self.url, self.answers, self.random = url, answers, random.Random(number)
        self.stop = threading.Event()
        self.outcomes: list[str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            prompt = self.random.choice(list(self.answers))
            stream = self.random.random() < 0.7
            body = {
                "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True,
                "cache_salt": str(self.random.random()), "stream": stream,
            }  # fmt: skip
            self.outcomes.append(self.ask(body, self.answers[prompt]))

    def ask(self, body: dict[str, object], text: str) -> str:
        answer = httpx.post(self.url + URL, json=body, timeout=60)
        if not body["stream"] or answer.status_code != 200:
            right = answer.status_code == 200 and answer.json()["choices"][0]["text"] == text
            return "right" if right else f"status {answer.status_code}"
        *events, done = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data:")]
        assert done == "[DONE]" and events.count("[DONE]") == 0
        chunks = [json.loads(event) for event in events]
        errors = [chunk for chunk in chunks if "error" in chunk]
        told = "".join(c["choices"][0]["text"] for c in chunks if "error" not in c)
        ends = [c for c in chunks if "error" not in c and c["choices"][0]["finish_reason"]]
        assert text.startswith(told) and len(errors) + len(ends) == 1
        return "right" if told == text and ends else "broken"


@pytest.mark.slow
def test_kill_9_of_either_side_at_random_moments(alone: LLM, tmp_path) -> None:
    answers = {prompt: expected(alone, prompt)[0] for prompt in PROMPTS}
    site = PDSite(tmp_path, lease=LEASE)
    moments = random.Random(1)
    callers = [Caller(site.url, answers, number) for number in range(3)]
    try:
        for caller in callers:
            caller.start()
        for side in (site.prefill, site.decode, site.prefill):
            time.sleep(moments.uniform(0.5, 2.0))
            before = [len(caller.outcomes) for caller in callers]
            stale = Tickets(site).params(PROMPTS[0]) if side is site.prefill else None
            side.kill()
            time.sleep(moments.uniform(0.0, 1.0))
            side.start()
            side.wait_ready()
            site.wait_for("ok")
            if side is site.prefill:  # D has done without
                lost = [
                    set(c.outcomes[n:]) - {"right"} for c, n in zip(callers, before, strict=True)
                ]
                assert lost == [set()] * 3
                assert Tickets(site).ask(PROMPTS[0], stale) == (answers[PROMPTS[0]], 0)
        time.sleep(1)
        for caller in callers:
            caller.stop.set()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
            assert set(caller.outcomes) <= {"right", "broken", "status 503"}
            assert caller.outcomes[-1] == "right"
        assert site.prefill.becomes_idle(LEASE + 5) and site.decode.becomes_idle(LEASE + 5)
        before_ways = site.ways()
        assert httpx.post(
            site.url + URL, json={"prompt": "new " + STORY * 9}, timeout=60
        ).is_success
        assert site.ways()["prefill"] == before_ways["prefill"] + 1
    finally:
        for caller in callers:
            caller.stop.set()
        site.close()
