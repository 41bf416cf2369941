"""The kernels' self-test in C on this processor; scripts/test-aarch64 runs it for another."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from quire.kernels.cpu.build import FLAGS, SOURCES, BuildError, find_compiler, machine_flag

SOURCE = Path(__file__).parent / "self_test.c"


def test_the_kernels_are_what_plain_loops_say(tmp_path: Path) -> None:
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    program = tmp_path / "self_test"
    command = [*compiler, *FLAGS, machine_flag("native"), f"-I{SOURCES}", str(SOURCE)]
    subprocess.run([*command, "-o", str(program), "-lm"], check=True, capture_output=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout
