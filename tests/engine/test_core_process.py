"""The engine core's process: how it ends, and what it costs while it has nothing to do."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from quire.config import from_flat
from quire.engine.core_client import CoreProcess
from quire.engine.setup import locate
from quire.errors import CheckpointError
from quire.messages import AddRequest, FinishReason, Ping, Pong, StepOutputs
from tests.engine.checkpoints import ServableCheckpoint
from tests.scheduler.requests import add_request

OPTIONS = {"max_num_seqs": 2, "max_model_len": 64, "num_gpu_blocks_override": 20}


def start(checkpoint: ServableCheckpoint) -> CoreProcess:
    core = CoreProcess()
    core.configure(locate(from_flat({"model": str(checkpoint.directory), **OPTIONS})))
    core.wait_ready()
    return core


def add(request_id: int, prompt: list[int]) -> AddRequest:
    return add_request(request_id, prompt, max_tokens=3)


def test_a_request_the_scheduler_refuses_fails_alone(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    core = start(servable("llama"))
    try:
        core.send(add(1, [1] * 100))  # slipped past the front end: longer than the context
        core.send(add(2, [1, 2]))
        ended = {}
        while len(ended) < 2:
            message = core.receive(timeout=30)
            assert isinstance(message, StepOutputs)
            for update in message.updates:
                if update.finish_reason is not None:
                    ended[update.request_id] = update.finish_reason
        assert ended == {1: FinishReason.ERROR, 2: FinishReason.LENGTH}
    finally:
        core.close()


def test_idle_core_uses_no_cpu_and_answers_pings(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    core = start(servable("llama"))
    try:
        core.send(add(1, [1, 2]))
        while core.receive(timeout=0.5) is not None:
            pass
        process = psutil.Process(core.process.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(3.0)
        assert sum(process.cpu_times()[:2]) - before < 0.03  # 1 % of 3 s
        core.send(Ping(7))
        answer = core.receive(timeout=10)
        assert isinstance(answer, Pong) and answer.nonce == 7
    finally:
        core.close()
    assert core.process.returncode == 0


@pytest.mark.parametrize("configured", [True, False])
def test_core_leaves_when_its_parent_is_killed(
    servable: Callable[[str], ServableCheckpoint], tmp_path: Path, configured: bool
) -> None:
    script = textwrap.dedent(
        f"""
        import time
        from quire.config import from_flat
        from quire.engine.core_client import CoreProcess
        from quire.engine.setup import locate
        core = CoreProcess()
        if {configured}:
            core.configure(locate(from_flat({{"model": {str(servable("llama").directory)!r}}})))
            core.wait_ready()
        print(core.process.pid, flush=True)
        time.sleep(60)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, _ = psutil.wait_procs([child], timeout=60)  # it may be importing torch
    assert gone, "the core outlived its parent"


def test_a_core_that_was_never_configured_can_be_closed() -> None:
    core = CoreProcess()
    directory = core._directory
    core.close()
    core.close()
    assert core.process.returncode == -signal.SIGKILL
    assert not Path(directory).exists()


def test_what_is_wrong_with_the_model_reaches_the_front_end(tmp_path: Path) -> None:
    """The core reads the checkpoint itself; the front end may have found nothing wrong with it."""
    core = CoreProcess(kernels="reference")
    try:
        core.configure(from_flat({"model": str(tmp_path)}))
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
            core.wait_ready()
    finally:
        core.close()
