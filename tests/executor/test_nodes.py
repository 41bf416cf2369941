"""Ranks on two machines: network namespaces where root may make them, else one machine twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.builtin import MODEL_DIR
from quire.config import EngineConfig, ModelConfig
from quire.config.parallel import ParallelConfig
from quire.distributed import hello
from quire.engine.assemble import worker_spec
from quire.engine.setup import locate, resolve
from quire.errors import ConfigError
from quire.executor import nodes
from quire.executor.nodes import NodeRanks, fingerprint, numbers_of
from tests.free_ports import free_port

ROOT = Path(__file__).parents[2]
KEY = "an example of a key, 32 bytes or so"
SECONDS = 120.0
"""Enough for a start on a busy machine."""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_NODE_KEY", KEY)
    monkeypatch.setattr(nodes, "START_SECONDS", SECONDS)


class Machines:
    """`prefix[i]`: what runs a command on machine i. address: of the first."""

    def __init__(self, prefix: list[list[str]], address: str) -> None:
        self.prefix, self.address = prefix, address


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture(params=["namespaces", "loopback"])
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    if request.param == "loopback":
        yield Machines([[], []], "127.0.0.1")
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"quire{i}-{os.getpid()}" for i in range(2)]
    ends = [f"qv{i}-{os.getpid()}"[:15] for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for i, (name, end) in enumerate(zip(names, ends, strict=True)):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "addr", "add", f"10.199.7.{i + 1}/24", "dev", end)
                for device in (end, "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield Machines([["ip", "netns", "exec", name] for name in names], "10.199.7.1")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)


class Pair:
    """`quire serve` on two machines. layout: the options -tp and -pp."""

    def __init__(self, machines: Machines, layout: list[str], directory: Path) -> None:
        self.machines = machines
        master = free_port()
        self.port = free_port()
        self.logs = [directory / f"node{i}.log" for i in range(2)]
        self.processes = []
        for i in range(2):
            command = [*machines.prefix[i], sys.executable, "-m", "quire", "serve", *layout]
            command += ["--nnodes", "2", "--node-rank", str(i), "--master-addr", machines.address]
            command += ["--master-port", str(master), "--cpu-threads", "1"]
            command += ["--port", str(self.port)] if i == 0 else ["--headless"]
            with self.logs[i].open("w") as log:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    def ask(self, prompt: str, max_tokens: int) -> str:
        """From the first machine."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        script = (
            "import sys, urllib.request as u; r = u.Request(sys.argv[1], sys.argv[2].encode(), "
            "{'Content-Type': 'application/json'}); print(u.urlopen(r, timeout=60).read().decode())"
        )
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        until = time.monotonic() + SECONDS
        while True:
            done = subprocess.run(
                [*self.machines.prefix[0], sys.executable, "-c", script, url, json.dumps(body)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            if done.returncode == 0:
                return str(json.loads(done.stdout)["choices"][0]["text"])
            text = "".join(log.read_text() for log in self.logs)
            assert time.monotonic() < until and self.processes[0].poll() is None, text + done.stderr
            time.sleep(0.5)

    def worker(self) -> int:
        """The process of the second machine's first rank."""
        pid = self.processes[1].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0])

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize(
    ("layout", "rank"), [("-tp 4", 2), ("-pp 2", 0), ("-tp 2 -pp 2", 0)], ids=str
)
def test_two_machines_give_the_tokens_of_one(
    layout: str, rank: int, machines: Machines, tmp_path: Path
) -> None:
    """rank: the first one of the second machine."""
    prompt = "A quire is a set of sheets"
    pair = Pair(machines, layout.split(), tmp_path)
    try:
        text = pair.ask(prompt, 24)
        llm = LLM(enforce_eager=True)
        expected = llm.generate([prompt], SamplingParams(max_tokens=24, temperature=0))
        assert text == expected[0].outputs[0].text
        llm.close()
        worker = pair.worker()
        os.kill(worker, signal.SIGKILL)
        assert [process.wait(SECONDS) for process in pair.processes] == [1, 1]
        first, second = (log.read_text() for log in pair.logs)
        address = "10.199.7.2" if machines.prefix[0] else "127.0.0.1"
        assert (
            f"Rank {rank} ({address}:" in first
            and "has ended, or its node cannot be reached" in first
        )
        assert f"rank {rank} ended with status -9" in second
        assert not Path(f"/proc/{worker}").exists()
    finally:
        pair.close()


# --- nodes that do not fit: the first node in a thread, the others as processes ------------------------


def first_node(port: int, found: list[BaseException]) -> None:
    parallel = ParallelConfig(tensor_parallel_size=3, nnodes=3, master_port=port)
    config = locate(EngineConfig(parallel=parallel))
    try:
        NodeRanks(config, worker_spec(resolve(config), 128)).close()
    except ConfigError as error:
        found.append(error)


def node(port: int, rank: int, *flags: str, key: str = KEY) -> subprocess.Popen[str]:
    options = {"-tp": "3", "--nnodes": "3", "--node-rank": str(rank), "--master-port": str(port)}
    options |= dict(zip(flags[::2], flags[1::2], strict=True))
    words = [word for pair in options.items() for word in pair]
    return subprocess.Popen(
        [sys.executable, "-m", "quire", "serve", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "QUIRE_NODE_KEY": key},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same shapes, other weights."""
    directory = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(MODEL_DIR, directory)
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(50))
    return str(directory)


CASES = {
    "another key": ((), "has another key than this node"),
    "another model": (("--model", "OTHER"), "model is '"),
    "another size": (("-tp", "6"), "tensor_parallel_size is 6, not 3"),
    "another dtype": (("--dtype", "float32"), "dtype is 'float32', not 'bfloat16'"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_node_that_does_not_fit_is_one_error_on_every_node(case: str, other_model: str) -> None:
    flags, named = CASES[case]
    port = free_port()
    found: list[BaseException] = []
    thread = threading.Thread(target=first_node, args=(port, found))
    thread.start()
    right = node(port, 1)
    wrong = node(
        port,
        2,
        *(other_model if word == "OTHER" else word for word in flags),
        key="the key of another group" if case == "another key" else KEY,
    )
    errors = []
    for process in (right, wrong):
        try:
            _, text = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            for waiting in (right, wrong):
                waiting.kill()
                waiting.communicate()
            raise AssertionError(f"a node waits; the first one: {found}") from None
        assert process.returncode == 2, text
        errors += [line for line in text.splitlines() if line.startswith("quire: error: ")]
    thread.join(SECONDS)
    assert len(errors) == 2 and len(found) == 1
    for error in (*errors, str(found[0])):
        assert named in error


def test_a_node_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "START_SECONDS", 0.2)
    found: list[BaseException] = []
    first_node(free_port(), found)
    assert str(found[0]).startswith("Rank 1, 2 did not connect to 127.0.0.1:")


@pytest.mark.parametrize(
    ("tensor", "stages", "nodes", "expected"),
    [
        (6, 1, 3, [[0, 1], [2, 3], [4, 5]]),
        (1, 4, 2, [[2, 3], [0, 1]]),
        (2, 2, 2, [[2, 3], [0, 1]]),
        (2, 4, 2, [[4, 5, 6, 7], [0, 1, 2, 3]]),
        (4, 2, 4, [[4, 5], [6, 7], [0, 1], [2, 3]]),
        (3, 2, 3, [[3, 4], [5, 0], [1, 2]]),
    ],
)
def test_ranks_of_nodes(tensor: int, stages: int, nodes: int, expected: list[list[int]]) -> None:
    parallel = ParallelConfig(
        tensor_parallel_size=tensor, pipeline_parallel_size=stages, nnodes=nodes
    )
    assert [numbers_of(parallel, node) for node in range(nodes)] == expected


def test_what_makes_a_fingerprint(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model)
    first = fingerprint(model)
    assert first == fingerprint(Path(MODEL_DIR))
    weights = model / "model.safetensors"
    os.rename(weights, model / "model-00001.safetensors")
    assert fingerprint(model) == first
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert fingerprint(model) != first
    assert len(fingerprint(model / "model-00001.safetensors")) == 16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nnodes": 2, "tensor_parallel_size": 3}, "cannot be divided evenly among 2 nodes"),
        (
            {"nnodes": 2, "tensor_parallel_size": 2, "data_parallel_size": 2},
            "copies are on one machine",
        ),
        ({"headless": True}, "headless is for node_rank 1"),
        ({"nnodes": 2, "tensor_parallel_size": 2, "node_rank": 2}, "from 0 to 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ParallelConfig(**options)  # type: ignore[arg-type]


def test_addresses_that_others_reach_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hello.KEY_VARIABLE)
    parallel = ParallelConfig(tensor_parallel_size=2, nnodes=2, master_addr="0.0.0.0")
    config = locate(EngineConfig(model=ModelConfig(), parallel=parallel))
    spec = worker_spec(resolve(config), 128)
    with pytest.raises(ConfigError, match="need a shared key"):
        NodeRanks(config, spec)
    later = dataclasses.replace(config, parallel=dataclasses.replace(parallel, node_rank=1))
    with pytest.raises(ConfigError, match="node_rank 1 runs no engine of its own"):
        NodeRanks(later, spec)
    with pytest.raises(ConfigError, match="nnodes 2 is for --device cpu"):
        NodeRanks(config, dataclasses.replace(spec, device="cuda"))
