"""Whatever process is killed or stopped, and when: nothing is left behind, and there is one typed error."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from quire.config import from_flat
from quire.engine.core_client import CoreProcess
from quire.engine.llm import LLM
from quire.engine.setup import locate
from quire.errors import WorkerError
from quire.messages import Control, CoreFailed, CoreOutput, Sleep
from quire.messages.failures import error_of
from quire.sampling_params import SamplingParams
from tests.engine.checkpoints import ServableCheckpoint
from tests.scheduler.requests import add_request

Servable = Callable[[str], ServableCheckpoint]
OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "max_num_seqs": 4,
    "max_model_len": 256,
    "num_gpu_blocks_override": 80,
    "worker_timeout": 60.0,
}
SECONDS = 60
"""A liveness deadline: the machine may be busy."""
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


def start(checkpoint: ServableCheckpoint, **options: Any) -> CoreProcess:
    config = locate(from_flat({"model": str(checkpoint.directory), **OPTIONS, **options}))
    core = CoreProcess(parallel=config.parallel)
    core.configure(config)
    return core


def processes_of(core: CoreProcess) -> tuple[psutil.Process, psutil.Process]:
    """The core and its other rank."""
    process = psutil.Process(core.process.pid)
    until = time.monotonic() + SECONDS
    while not (children := process.children()) and time.monotonic() < until:
        time.sleep(0.01)
    return process, children[0]


def work(core: CoreProcess) -> None:
    for request_id in range(3):
        core.send(add_request(request_id, [1, 2, 3], max_tokens=200))


def failure_of(core: CoreProcess) -> Exception:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        message: CoreOutput | None = core.receive(timeout=1)
        if isinstance(message, CoreFailed):
            return error_of(message.failure)
    raise AssertionError("no failure was reported")


def assert_gone(*processes: psutil.Process) -> None:
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    assert not alive, alive


@pytest.mark.parametrize("moment", ["start", "idle", "step", "sleep"])
def test_a_killed_rank_is_named(servable: Servable, moment: str) -> None:
    core = start(servable("llama"))
    try:
        process, rank = processes_of(core)
        if moment != "start":
            core.wait_ready()
        if moment == "sleep":
            core.send(Control(1, Sleep(2)))
            core.receive(timeout=SECONDS)
        if moment == "step":
            work(core)
            core.receive(timeout=SECONDS)
        rank.kill()
        error = failure_of(core)
        assert isinstance(error, WorkerError), error
        assert str(error) == f"Rank 1 (pid {rank.pid}) was killed by SIGKILL."
        assert_gone(process, rank)
    finally:
        core.close()


def test_a_stopped_rank_is_named_and_ended(servable: Servable) -> None:
    core = start(servable("llama"), worker_timeout=10.0)  # a busy machine may need seconds to load
    try:
        core.wait_ready()
        process, rank = processes_of(core)
        rank.send_signal(signal.SIGSTOP)
        work(core)
        error = failure_of(core)
        assert isinstance(error, WorkerError), error
        assert str(error) == f"Rank 1 (pid {rank.pid}) is late by 10 s."
        assert_gone(process, rank)
    finally:
        core.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_end_with_a_core_that_is_killed(servable: Servable, stopped: bool) -> None:
    """A stopped one too, which notices nothing."""
    core = start(servable("llama"))
    try:
        core.wait_ready()
        process, rank = processes_of(core)
        work(core)
        if stopped:
            rank.send_signal(signal.SIGSTOP)
        process.kill()
        assert_gone(process, rank)
    finally:
        core.close()


@pytest.mark.parametrize("configured", [True, False])
def test_all_end_with_a_front_end_that_is_killed(servable: Servable, configured: bool) -> None:
    script = textwrap.dedent(
        f"""
        import time
        from quire.config import from_flat
        from quire.engine.core_client import CoreProcess
        from quire.engine.setup import locate
        config = locate(from_flat({{"model": {str(servable("llama").directory)!r}, **{OPTIONS!r}}}))
        core = CoreProcess(parallel=config.parallel)
        if {configured}:
            core.configure(config)
            core.wait_ready()
        print(core.process.pid, core._directory, flush=True)
        time.sleep(60)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, directory = parent.stdout.readline().split()
    process = psutil.Process(int(pid))
    until = time.monotonic() + SECONDS
    while not (ranks := process.children()) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(random.random() / 2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert_gone(process, *ranks)
    assert not os.path.exists(directory)


def test_in_the_callers_process_every_call_has_the_error(servable: Servable) -> None:
    llm = LLM(str(servable("llama").directory), **OPTIONS)
    [rank] = llm._core._core.executor._others.ranks
    os.kill(rank.process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(WorkerError, match=rf"Rank 1 \(pid {rank.process.pid}\) was killed"):
            llm.generate([[1, 2]], LONG, use_tqdm=False)
    llm.close()
    assert rank.process.returncode == -signal.SIGKILL


def test_what_is_not_of_the_protocol_changes_nothing(servable: Servable) -> None:
    with LLM(str(servable("llama").directory), **OPTIONS) as llm:
        expected = llm.generate([[1, 2]], LONG, use_tqdm=False)[0].outputs[0].token_ids
        executor = llm._core._core.executor
        [rank] = executor._others.ranks
        chance = random.Random(0)
        for size in (0, 1, 7, 100):
            rank.link.send(chance.randbytes(size))
            executor._others.watch._take(rank, chance.randbytes(size))
        found = llm.generate([[1, 2]], LONG, use_tqdm=False)[0].outputs[0].token_ids
        assert found == expected


@pytest.mark.slow
def test_many_engines_start_at_once(servable: Servable) -> None:
    checkpoint, count = servable("llama"), 20

    def run(index: int) -> list[int]:
        options = {**OPTIONS, "worker_timeout": 120.0}
        with LLM(str(checkpoint.directory), engine="process", **options) as llm:
            output = llm.generate([[1, 2]], LONG.replace(max_tokens=5), use_tqdm=False)
        token_ids: list[int] = output[0].outputs[0].token_ids
        return token_ids

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(run, range(count)))
    assert len(found[0]) == 5 and all(each == found[0] for each in found)
