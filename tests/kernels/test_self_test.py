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


FAULTS = {
    # Each group is compiled once: nothing but the fault itself fails the check with its name.
    "one": [
        ("linear_panel.h", "[r * x_stride + k + half]", "[r * x_stride + k]", "linear bfloat16"),
        ("lora.c", "u->site->scales[rank + c] *", "", "adapters float32"),
        ("sampling.c", "c.ties-- <= 0", "c.ties-- < 0", "sample float32"),
        ("vec.h", "- (120u << 3)", "- (121u << 3)", "to float8 float32"),
        ("codes.c", "super_minimum = -vload", "super_minimum = vload", "codes float32"),
        ("kv_cache.c", "low | high", "low", "attention bfloat16"),
        ("elementwise.c", "/ (float)n + eps", "/ (float)n", "norm float32"),
    ],
    "two": [
        ("lora.c", "(all->rows[i + r] - begin)", "r", "no adapter float32"),
        ("vec.h", "u + 0x7fffu + ((u >> 16) & 1u)", "u + 0x8000u",
         "round to nearest even bfloat16"),
        ("codes.c", "vset_int((int32_t)-((uint32_t)p", "vset_int((int32_t)((uint32_t)p",
         "codes float32"),
        ("kv_cache.c", "offset / 2 * 2 * n + offset % 2", "offset / 2 * 2 * n",
         "attention bfloat16"),
        ("elementwise.c", "* scale, wt)", "* scale, dt)", "norm float16"),
    ],
    "three": [
        ("lora.c", "vset(t[r * stride + k])", "vset(t[k])", "adapters, row alone float32"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("group", FAULTS)
def test_it_notices_faults(tmp_path: Path, group: str) -> None:
    shutil.copytree(SOURCES, tmp_path / "cpu")
    for file, right, wrong, _ in FAULTS[group]:
        source = tmp_path / "cpu" / file
        text = source.read_text()
        assert text.count(right) >= 1, right
        source.write_text(text.replace(right, wrong))
    test = shutil.copy(Path(__file__).parent / "self_test.c", tmp_path / "self_test.c")
    program = compiled(tmp_path, Path(test), include=tmp_path / "cpu", is_quick=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    for _, _, wrong, check in FAULTS[group]:
        assert f"FAILED {check} [" in done.stdout, wrong
