"""Ranks that wait for each other in C: order of memory, lateness, death, failure."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ctypes import byref
from pathlib import Path

import pytest
import torch

from quire.errors import WorkerError
from quire.kernels.cpu.build import SOURCES, BuildError, find_compiler, machine_flag
from quire.kernels.cpu.group import HEADER, LATE, CalledGroup, SharedGroup, c_group
from quire.kernels.cpu.library import Group as NativeGroup
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.native import NativeKernels

DATA = 1 << 16
STRESS = Path(__file__).parent / "group_stress.c"


@pytest.fixture
def memory(native: NativeKernels) -> Iterator[int]:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, HEADER + DATA)
    yield descriptor
    os.close(descriptor)


def views(memory: int, size: int, timeout: float = 20.0) -> list[SharedGroup]:
    return [SharedGroup(memory, rank=rank, size=size, timeout=timeout) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_rank_passes_before_all_have_come(memory: int, size: int) -> None:
    groups = views(memory, size)
    counts = [0] * size
    seen: list[bool] = []

    def run(rank: int) -> None:
        for turn in range(1, 200):
            counts[rank] = turn
            groups[rank].barrier()
            seen.append(min(counts) >= turn)
            groups[rank].barrier()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 199 * size and all(seen)
    for group in groups:
        group.close()


def test_counts_wrap_around(memory: int) -> None:
    groups = views(memory, 2)
    for rank in groups[0].native.words.contents.ranks[:2]:
        rank.sequence = 2**32 - 2
    other = threading.Thread(target=lambda: [groups[1].barrier() for _ in range(5)])
    other.start()
    for _ in range(5):
        groups[0].barrier()
    other.join()
    assert groups[0].native.words.contents.ranks[0].sequence == 3


def test_a_late_rank_is_named_to_all(memory: int) -> None:
    groups = views(memory, 3, timeout=0.2)
    errors: list[str] = []

    def wait(rank: int) -> None:
        with pytest.raises(WorkerError) as caught:
            groups[rank].barrier()
        errors.append(str(caught.value))

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [f"Rank 1 (pid {os.getpid()}) is late by 0.2 s."] * 2
    wait(1)  # it comes after all: it is told
    assert len(set(errors)) == 1


def test_a_slow_rank_is_no_error_before_the_timeout(memory: int) -> None:
    groups = views(memory, 2, timeout=60)
    late = threading.Timer(0.5, groups[1].barrier)
    late.start()
    groups[0].barrier()
    late.join()


def test_an_abort_ends_a_wait_and_its_first_message_counts(memory: int) -> None:
    groups = views(memory, 2, timeout=600)
    watcher = threading.Timer(0.2, groups[0].abort, ("rank 1 (pid 123) was killed by SIGKILL",))
    watcher.start()
    with pytest.raises(WorkerError, match=r"^rank 1 \(pid 123\) was killed by SIGKILL$"):
        groups[0].barrier()
    watcher.join()
    groups[0].abort("another reason")
    with pytest.raises(WorkerError, match="SIGKILL"):
        groups[1].barrier()


def test_a_message_of_any_length_is_cut(memory: int) -> None:
    groups = views(memory, 2)
    groups[1].abort("ä" * 1000)
    with pytest.raises(WorkerError, match=r"^ä{239}"):
        groups[0].barrier()


CHILD = """
import os, sys, time
from quire.kernels.cpu.group import SharedGroup
group = SharedGroup(int(sys.argv[1]), rank=1, size=3, timeout=600)
for _ in range(3): group.barrier()
os.kill(os.getpid(), 9)
"""


def test_the_death_of_a_rank_is_noticed_without_a_watcher(memory: int) -> None:
    groups = [SharedGroup(memory, rank=rank, size=3, timeout=600) for rank in (0, 2)]
    command = [sys.executable, "-c", CHILD, str(memory)]
    errors: list[str] = []

    def run(group: SharedGroup) -> None:
        with pytest.raises(WorkerError) as caught:
            for _ in range(4):
                group.barrier()
        errors.append(str(caught.value))

    with subprocess.Popen(command, pass_fds=[memory]) as child:  # waited for at the end: a zombie
        threads = [threading.Thread(target=run, args=(group,)) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == [f"Rank 1 (pid {child.pid}) has ended."] * 2


def test_a_wait_takes_no_processor_time(memory: int) -> None:
    groups = views(memory, 2)
    late = threading.Timer(0.5, groups[1].barrier)
    late.start()
    before = time.thread_time()
    groups[0].barrier()
    assert time.thread_time() - before < 0.25
    late.join()


def test_after_close_there_is_an_error_and_no_crash(memory: int) -> None:
    group = SharedGroup(memory, rank=0, size=1, timeout=1)
    group.barrier()
    group.close()
    group.close()
    group.abort("nobody")
    with pytest.raises(WorkerError, match="closed"):
        group.barrier()


class Joined:
    """A group without shared memory: two ranks, of which the other has ones."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.barriers = 0

    def gather(self, x: torch.Tensor, first: int, width: int) -> torch.Tensor:
        if len(x) == 13:
            raise WorkerError("Rank 1 has ended.")
        whole = torch.ones(len(x), width, dtype=x.dtype)
        whole[:, first : first + x.shape[1]] = x
        return whole

    def barrier(self) -> None:
        self.barriers += 1

    def close(self) -> None:
        pass


def gather_in_c(native: NativeGroup, whole: torch.Tensor, first: int, count: int) -> int:
    rows, width = whole.shape
    place, size = whole.data_ptr(), whole.element_size()
    return load_library().quire_group_gather(byref(native), place, rows, width, first, count, size)


def test_a_group_without_shared_memory_is_called(native: NativeKernels) -> None:
    group = Joined()
    called = c_group(group)
    assert isinstance(called, CalledGroup) and not called.native.data
    whole = torch.zeros(5, 7, dtype=torch.bfloat16)
    whole[:, :3] = 2.5
    assert gather_in_c(called.native, whole, 0, 3) == 0
    assert (
        whole.tolist() == [[2.5] * 3 + list(torch.ones(8).byte().view(torch.bfloat16).tolist())] * 5
    )
    assert load_library().quire_group_barrier(byref(called.native)) == 0 and group.barriers == 1


def test_its_error_is_raised_after_the_program(native: NativeKernels) -> None:
    called = c_group(Joined())
    code = gather_in_c(called.native, torch.zeros(13, 4), 0, 2)
    assert code and code != LATE
    with pytest.raises(WorkerError, match=r"Rank 1 has ended\."):
        called.fail(code)


def test_the_structs_have_the_sizes_of_c(native: NativeKernels, tmp_path: Path) -> None:
    (tmp_path / "sizes.c").write_text(
        '#include <stdio.h>\n#include "kernels.h"\nint main(void) { printf("%zu %zu", '
        "sizeof(group_words), sizeof(quire_group)); return 0; }"
    )
    compiler = [*find_compiler(), machine_flag("native"), "-Wno-psabi", f"-I{SOURCES}"]
    command = [*compiler, str(tmp_path / "sizes.c"), "-o", str(tmp_path / "sizes")]
    subprocess.run(command, check=True, timeout=120)
    sizes = subprocess.check_output([tmp_path / "sizes"], text=True, timeout=20)
    assert sizes == f"{HEADER} {ctypes.sizeof(NativeGroup)}"


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("group") / "stress"
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    flags = ["-O1", "-g", machine_flag("native"), "-Wno-psabi", "-pthread", "-fsanitize=thread"]
    command = [*compiler, *flags, f"-I{SOURCES}", str(STRESS), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0 and "tsan" in done.stderr:
        pytest.skip("no ThreadSanitizer here")
    assert done.returncode == 0, done.stderr
    return binary


@pytest.mark.parametrize("arguments", [["2", "20000"], ["3", "3000"]])
def test_no_race(stress: Path, arguments: list[str]) -> None:
    done = subprocess.run([stress, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr
