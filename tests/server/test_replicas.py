"""`quire serve -dp 2` through OpenAI's client, before and after one of its engine cores is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_openai_client import QUESTION, Server

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("-dp", "2", "--enable-admin-endpoints", "--max-core-deaths", "1")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def single() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def cores(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [each for each in children if "quire.engine.core_process" in each.cmdline()]


def by_engine(server: Server, name: str) -> dict[str, float]:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {s.labels["engine"]: s.value for s in samples if s.name == name}


def answers(server: Server) -> list[object]:
    client = server.client
    found: list[object] = []
    for index in range(4):
        question = [{"role": "user", "content": f"{index}: {QUESTION[0]['content']}"}]
        chat = client.chat.completions.create(
            model="quire-builtin", messages=question, max_tokens=12, seed=3, n=2, temperature=0.8
        )
        found.append([choice.message.content for choice in chat.choices])
        stream = client.chat.completions.create(
            model="quire-builtin", messages=question, max_tokens=12, temperature=0, stream=True
        )
        found.append("".join(chunk.choices[0].delta.content or "" for chunk in stream))
        vector = client.embeddings.create(
            model="quire-builtin", input=str(index), encoding_format="float"
        )
        found.append(vector.data[0].embedding)
    return found


def test_the_answers_of_one_process(server: Server, single: Server) -> None:
    assert answers(server) == answers(single)
    assert len(cores(server)) == 2
    assert by_engine(server, "quire:replica_up") == {"0": 1, "1": 1}
    tokens = by_engine(server, "vllm:generation_tokens_total")
    assert tokens.keys() == {"0", "1"} and all(tokens.values())
    assert server.http.get("/health").json()["replicas"] == ["ok", "ok"]
    assert by_engine(single, "quire:replica_up") == {}


def test_sleep_and_wake_up(server: Server) -> None:
    assert server.http.post("/sleep?level=1").status_code == 200
    assert server.http.get("/ready").json() == {"status": "sleeping"}
    assert server.http.post("/wake_up").status_code == 200
    assert server.http.post("/reset_prefix_cache").json() == {"success": True}
    assert server.http.get("/ready").status_code == 200


def test_one_core_is_killed_and_the_other_serves(server: Server) -> None:
    model = "quire-builtin"
    errors: list[int] = []
    texts: list[str] = []
    done = threading.Semaphore(0)
    victim = cores(server)[1]
    victim.suspend()  # so that its requests are certainly under way when it ends

    def ask(index: int) -> None:
        try:
            stream = server.client.completions.create(
                model=model, prompt=f"{index} " * 9, max_tokens=60, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            texts.append("".join(chunk.choices[0].text for chunk in stream))
            done.release()
        except openai.APIStatusError as error:
            errors.append(error.status_code)
        except openai.APIError as error:
            errors.append(int(str(getattr(error, "code", 0) or 0)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    assert done.acquire(timeout=60), "the other goes on"
    victim.kill()
    for thread in threads:
        thread.join(60)
    assert len(errors) + len(texts) == 8 and 0 < len(errors) < 8 and set(errors) == {503}
    health = server.http.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "degraded" and health.json()["replicas"].count("ok") == 1
    up = by_engine(server, "quire:replica_up")
    assert sorted(up.values()) == [0, 1]
    [dead] = [engine for engine, value in up.items() if not value]
    assert by_engine(server, "vllm:num_requests_running")[dead] == 0
    assert server.http.get("/ready").status_code == 200
    answer = server.client.completions.create(model=model, prompt="def f(", max_tokens=4)
    assert answer.choices[0].finish_reason
    cores(server)[0].kill()
    assert server.process.wait(30) == 1
