"""`quire serve` whose engine core dies: what probes, clients and metrics are told."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from scripted_engine import data_lines
from test_openai_client import Server
from test_replicas import by_engine, cores
from tests.engine import dying_core

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="restarts need epoll"),
]
SECONDS = 120.0
DEADLY = {
    "prompt": [dying_core.MARK] * dying_core.TIMES, "max_tokens": 20, "temperature": 0, "ignore_eos": True,
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []
    for name, text in dying_core.environment(tmp_path, "SIGSEGV").items():
        monkeypatch.setenv(name, text)

    def start(*flags: str) -> Server:
        made.append(Server(*flags))
        return made[-1]

    yield start
    for server in made:
        server.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(server: Server, path: str) -> tuple[int, str]:
    answer = server.http.get(path)
    return answer.status_code, answer.json()["status"]


def kill(server: Server) -> None:
    """And wait for the next one, or for the server's end."""
    [old] = cores(server)
    old.kill()
    wait_for(lambda: server.process.poll() is not None or has_another(server, old))


def has_another(server: Server, old: psutil.Process) -> bool:
    try:
        return old not in cores(server) and status(server, "/ready") == (200, "ready")
    except (psutil.NoSuchProcess, httpx.HTTPError):
        return server.process.poll() is not None


def test_a_stream_does_not_notice_and_probes_do(make: Callable[..., Server]) -> None:
    server = make()
    body = {
        "model": "quire-builtin", "prompt": "def f(", "max_tokens": 400, "temperature": 0.8, "seed": 3,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    expected = server.client.completions.create(**body)
    [old] = cores(server)
    old.suspend()  # so that it certainly dies before the end
    chunks = server.client.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    )
    old.kill()
    seen = set()

    def is_back() -> bool:
        seen.add((status(server, "/ready"), status(server, "/health")))
        return has_another(server, old) and len(seen) > 1

    wait_for(is_back)
    assert ((503, "restarting"), (200, "restarting")) in seen
    rest = list(chunks)
    text = "".join(chunk.choices[0].text for chunk in rest if chunk.choices)
    assert text == expected.choices[0].text
    used = rest[-1].usage
    assert used.completion_tokens == expected.usage.completion_tokens == 400
    assert used.prompt_tokens == expected.usage.prompt_tokens
    assert by_engine(server, "quire:core_restarts_total") == {"0": 1}
    assert by_engine(server, "quire:requests_resumed_total") == {"0": 1}
    assert "was killed by SIGKILL" in server.text()


def test_a_request_of_which_the_core_dies(make: Callable[..., Server]) -> None:
    server = make()
    with server.http.stream("POST", "/v1/completions", json={**DEADLY, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = data_lines(answer.read().decode())
    assert lines[-1] == "[DONE]"
    *chunks, last = map(json.loads, lines[:-1])
    assert not any("error" in chunk for chunk in chunks), "one error, at the end"
    error = last["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("PoisonRequestError", 500)
    wait_for(lambda: status(server, "/ready") == (200, "ready"))
    again = server.http.post("/v1/completions", json=DEADLY)
    assert again.status_code == 500 and again.headers["x-should-retry"] == "false"
    assert again.json()["error"]["type"] == "PoisonRequestError"
    assert by_engine(server, "quire:core_restarts_total") == {"0": 2}
    assert by_engine(server, "quire:poison_requests_total") == {"0": 1}
    good = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    assert good.status_code == 200
    assert "was killed by SIGSEGV" in server.text()


def test_too_many_deaths_end_the_server(make: Callable[..., Server]) -> None:
    server = make("--max-core-deaths", "2")
    kill(server)
    assert status(server, "/health") == (200, "ok")
    body = {"model": "quire-builtin", "prompt": "a", "max_tokens": 1500, "stream": True}
    with server.client.completions.create(**body, extra_body={"ignore_eos": True}) as chunks:
        next(iter(chunks))
        kill(server)
        with pytest.raises(openai.APIError):
            for _ in chunks:
                pass
    assert server.process.wait(30) == 1, server.text()
    assert "death 2 within 600 s" in server.text()
