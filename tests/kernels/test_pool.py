"""The thread pool: each unit once, no data race, nothing lost over a fork."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from quire.kernels.cpu.build import SOURCES, BuildError, find_compiler, machine_flag
from quire.kernels.cpu.native import NativeKernels
from tests.kernels.cases import bits, generator, randn

STRESS = Path(__file__).parent / "pool_stress.c"


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("pool") / "stress"
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    flags = ["-O1", "-g", machine_flag("native"), "-Wno-psabi", "-pthread", "-fsanitize=thread"]
    command = [*compiler, *flags, f"-I{SOURCES}", str(STRESS), "-o", str(binary), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0 and "tsan" in done.stderr:
        pytest.skip("no ThreadSanitizer here")
    assert done.returncode == 0, done.stderr
    return binary


@pytest.mark.parametrize("arguments", [["2", "10000"], ["5", "5000"], ["3", "5000", "two"]])
def test_every_unit_once_and_no_race(stress: Path, arguments: list[str]) -> None:
    done = subprocess.run([stress, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr


def big_norm(native: NativeKernels, x: torch.Tensor) -> torch.Tensor:
    return native.rms_norm(x, torch.ones(x.shape[1]), 1e-5)


def test_two_callers_at_once_get_their_own_results(native: NativeKernels) -> None:
    inputs = [randn(400, 512, rng=generator(i)) for i in range(2)]
    expected = [bits(big_norm(native, x)) for x in inputs]
    torch.set_num_threads(2)
    same: list[bool] = []

    def call(index: int) -> None:
        torch.set_num_threads(2)
        results = (bits(big_norm(native, inputs[index])) for _ in range(200))
        same.extend(torch.equal(result, expected[index]) for result in results)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 400 and all(same)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_starts_its_own_workers(native: NativeKernels) -> None:
    x = randn(400, 512, rng=generator(3))
    torch.set_num_threads(2)
    expected = big_norm(native, x).numpy().tobytes()
    child = os.fork()
    if child == 0:
        # Compared as bytes: PyTorch's own pool does not live through a fork.
        same = all(big_norm(native, x).numpy().tobytes() == expected for _ in range(20))
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
