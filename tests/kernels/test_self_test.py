"""The kernels' self-test in C on this processor; scripts/test-aarch64 runs it for another."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from quire.kernels.cpu.build import FLAGS, SOURCES, BuildError, find_compiler, machine_flag


def compiled(
    directory: Path, source: Path, *, include: Path = SOURCES, is_quick: bool = False
) -> Path:
    """is_quick: without optimizing, and for any processor of this kind."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    flags = [*FLAGS, "-O0" if is_quick else machine_flag("native")]
    command = [*compiler, *flags, f"-I{include}", str(source)]
    program = directory / "self_test"
    subprocess.run([*command, "-o", str(program), "-lm"], check=True, capture_output=True)
    return program


def test_the_kernels_are_what_plain_loops_say(tmp_path: Path) -> None:
    program = compiled(tmp_path, Path(__file__).parent / "self_test.c")
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("linear_panel.h", "[r * x_stride + k + half]", "[r * x_stride + k]"),
        ("lora.c", "u->site->scales[rank + c] *", ""),
        ("lora.c", "vset(t[r * stride + k])", "vset(t[k])"),
        ("lora.c", "(all->rows[i + r] - begin)", "r"),
        ("sampling.c", "c.ties-- <= 0", "c.ties-- < 0"),
        ("vec.h", "u + 0x7fffu + ((u >> 16) & 1u)", "u + 0x8000u"),
        ("vec.h", "- (120u << 3)", "- (121u << 3)"),
        ("codes.c", "super_minimum = -vload_scales", "super_minimum = vload_scales"),
        ("codes.c", "vset_int((int32_t)-((uint32_t)p", "vset_int((int32_t)((uint32_t)p"),
        ("kv_cache.c", "offset / 2 * 2 * n + offset % 2", "offset / 2 * 2 * n"),
        ("kv_cache.c", "low | high", "low"),
        ("elementwise.c", "/ (float)n + eps", "/ (float)n"),
        ("elementwise.c", "* scale, wt)", "* scale, dt)"),
    ],
)
def test_it_notices_a_fault(tmp_path: Path, file: str, right: str, wrong: str) -> None:
    shutil.copytree(SOURCES, tmp_path / "cpu")
    source = tmp_path / "cpu" / file
    text = source.read_text()
    assert text.count(right) >= 1
    source.write_text(text.replace(right, wrong))
    test = shutil.copy(Path(__file__).parent / "self_test.c", tmp_path / "self_test.c")
    program = compiled(tmp_path, Path(test), include=tmp_path / "cpu", is_quick=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "FAILED" in done.stdout, done.stdout
