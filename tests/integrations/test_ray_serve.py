"""The Ray Serve application on two nodes: one process's tokens, streams, aborts, deaths, and scaling."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire import LLM, SamplingParams
from quire.builtin import MODEL_DIR
from tests.free_ports import free_port

from .ray_cluster import RayCluster, two_nodes

pytest.importorskip("ray.serve", reason="Ray is not installed (the extra `ray`)")

SERVE_RUN = [
    sys.executable,
    "-c",
    "from ray.serve.scripts import cli; cli()",
    "run",
    "--non-blocking",
]
MODEL = "slow"
OPTIONS = {"load_format": "dummy", "seed": 3, "served_model_name": MODEL, "max_model_len": 16384}
LONG: dict[str, Any] = {"model": MODEL, "prompt": "The sun", "max_tokens": 8000, "ignore_eos": True}
"""Half a minute of work."""
DEADLINE_SECONDS = 120

CONFIG = """
http_options: {{host: 127.0.0.1, port: {port}}}
proxy_location: HeadOnly
applications:
- name: scaled
  route_prefix: /scaled
  import_path: quire.integrations.ray:app
  args: {args}
  deployments:
  - name: Quire
    autoscaling_config:
      {{max_replicas: 2, target_ongoing_requests: 1.5, upscale_delay_s: 0.5, look_back_period_s: 1.0,
        metrics_interval_s: 0.2}}
"""


@dataclass
class Served:
    cluster: RayCluster
    port: int
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def replicas(self) -> list[int]:
        """Ids of the processes of the first application's replicas."""
        words = re.compile(r"ServeReplica:two:Quire\b")
        return [pid for pid, command in self.cluster.processes() if words.search(command)]

    def metric(self, name: str, prefix: str = "") -> dict[str, float]:
        """A metric's value for each replica."""
        text = httpx.get(f"{self.url}{prefix}/metrics", timeout=60).text
        pattern = rf'^{name}{{replica="([^"]*)"[^}}]*}} (\S+)$'
        return {replica: float(value) for replica, value in re.findall(pattern, text, re.MULTILINE)}

    def running(self, prefix: str = "") -> dict[str, float]:
        return self.metric("vllm:num_requests_running", prefix)

    def wait_for_running(self, *numbers: int) -> None:
        """Wait for a number of running requests in all, or for one of each replica."""
        seen: list[dict[str, float]] = []

        def reached() -> bool:
            seen.append(self.running())
            values = list(seen[-1].values())
            return (values if len(numbers) > 1 else [sum(values)]) == list(numbers)

        wait_until(reached, seen)

    @contextmanager
    def ask(self, **fields: object) -> Iterator[None]:
        """A request whose client disconnects at the end of the block, without reading the answer."""
        body = json.dumps(LONG | fields).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode() + body)
            yield


def wait_until(condition: Callable[[], object], seen: Sequence[object] = ()) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"it does not happen: {seen[-5:]}"
        time.sleep(0.1)


def complete(client: openai.OpenAI, max_tokens: int) -> None:
    client.completions.create(
        model=MODEL, prompt="The sun", max_tokens=max_tokens, extra_body={"ignore_eos": True}
    )


def serve_run(cluster: RayCluster, *words: str) -> None:
    done = subprocess.run(
        [*SERVE_RUN, *words],
        env=cluster.environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 M random parameters with the built-in model's tokenizer: as slow as these tests need it."""
    directory = tmp_path_factory.mktemp("model")
    for file in MODEL_DIR.glob("*.json"):
        shutil.copy(file, directory)
    config = json.loads((directory / "config.json").read_text())
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12,
             "num_attention_heads": 18, "num_key_value_heads": 6,
             "max_position_embeddings": 16384}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config | sizes))
    return directory


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    """Two applications, by both forms of `serve run`: one that scales, and one with two replicas at /."""
    port = free_port()
    options = OPTIONS | {"model": str(model), "num_cpus": 1}
    with two_nodes() as cluster:
        config = Path(cluster.environ["RAY_TMPDIR"], "serve.yaml")
        scaled = options | {"max_replicas": 2, "max_num_seqs": 1}
        config.write_text(CONFIG.format(port=port, args=json.dumps(scaled)))
        serve_run(cluster, str(config))
        words = [f"{name}={value}" for name, value in (options | {"num_replicas": 2}).items()]
        serve_run(cluster, "--name", "two", "quire.integrations.ray:app", *words)
        served = Served(cluster, port)
        with served.client:
            yield served


def test_the_tokens_of_one_process(served: Served, model: Path):
    prompts = ["The sun", "Once upon a time", "2 + 2 ="]
    reference = LLM(str(model), **OPTIONS)
    expected = reference.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
    for prompt, output in zip(prompts, expected, strict=True):
        answer = served.client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=24
        )
        assert answer.choices[0].text == output.outputs[0].text
        stream = served.client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=24, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == output.outputs[0].text


def test_errors_are_openais(served: Served):
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1") as raised:
        served.client.completions.create(model=MODEL, prompt="a", max_tokens=0)
    assert raised.value.param == "max_tokens"
    assert httpx.get(timeout=60, url=f"{served.url}/nowhere").json()["error"]["code"] == 404
    large = httpx.post(timeout=60, url=f"{served.url}/v1/completions", content=b"x" * (9 * 2**20))
    assert large.status_code == 413 and large.json()["error"]["param"] == "body"
    answer = httpx.get(timeout=60, url=f"{served.url}/health", headers={"x-request-id": "mine"})
    assert answer.status_code == 200 and answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(served: Served, stream: bool):
    def generated() -> float:
        return sum(served.metric("vllm:generation_tokens_total").values())

    before = generated()
    with served.ask(stream=stream):
        served.wait_for_running(1)
    served.wait_for_running(0)
    assert generated() - before < 8000


def test_requests_are_spread_and_each_is_found_wherever_it_is(served: Served):
    with ExitStack() as asked:
        for _ in range(3):
            asked.enter_context(served.ask())
        stream = served.client.completions.create(
            model=MODEL, prompt="The sun", max_tokens=8000, stream=True
        )
        name = next(stream).id
        served.wait_for_running(2, 2)
        answer = httpx.post(
            timeout=60, url=f"{served.url}/abort_requests", json={"request_ids": [name]}
        )
        assert answer.json() == {"aborted": [name]}
        assert list(stream)[-1].choices[0].finish_reason == "abort"
    served.wait_for_running(0)


def test_a_replica_that_dies_fails_its_own_requests_alone(served: Served):
    """And Serve starts another one. What is left of the engine core ends with its replica."""
    outcomes: list[str] = []

    def ask() -> None:
        try:
            complete(served.client, 1000)
            outcomes.append("whole")
        except openai.APIError as error:
            outcomes.append(str(error))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    served.wait_for_running(2, 2)
    victim = served.replicas()[0]
    cores = children(victim)
    os.kill(victim, signal.SIGKILL)
    for asker in askers:
        asker.join()
    outcomes.sort()
    assert all("replica that had this request has died" in text for text in outcomes[:2]), outcomes
    assert outcomes[2:] == ["whole", "whole"]
    assert cores
    wait_until(lambda: not set(cores) & {pid for pid, _ in served.cluster.processes()})
    wait_until(lambda: len(served.running()) == 2)


def test_a_replica_whose_engine_dies_is_replaced(served: Served):
    victim = served.replicas()[0]
    (core,) = children(victim)
    os.kill(core, signal.SIGKILL)
    wait_until(lambda: victim not in served.replicas())
    served.client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    wait_until(lambda: len(served.running()) == 2)


def test_waiting_requests_add_a_replica(served: Served):
    client = served.client.with_options(base_url=f"{served.url}/scaled/v1")
    wait_until(lambda: httpx.get(timeout=60, url=f"{served.url}/scaled/health").status_code == 200)
    assert len(served.running("/scaled")) == 1
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            complete(client, 100)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        wait_until(lambda: len(served.running("/scaled")) == 2)
    finally:
        stopped.set()
        for asker in askers:
            asker.join()


def children(process: int) -> list[int]:
    """Of all its threads."""
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(word) for file in files for word in file.read_text().split()]
