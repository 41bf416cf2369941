"""The tile kernels: AMX against plain C, and which of them a process chooses.

That plain C computes products and attention is tested where those are, by `scripts/test-isa tiles`.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quire.errors import ConfigError
from quire.kernels.cpu import tiles
from quire.kernels.cpu.build import FLAGS, SOURCES, BuildError, find_compiler
from quire.kernels.cpu.linear import PanelProduct
from quire.kernels.cpu.native import NativeKernels
from quire.kernels.cpu.tiles import VARIABLE, Tiles, choose_tiles
from quire.kernels.select import create_kernels
from tests.kernels.cases import bits, generator, randn

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    tiles._choose.cache_clear()
    yield
    tiles._choose.cache_clear()


def cpu_flags() -> list[str]:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8").split()


def has_amx() -> bool:
    return "amx_bf16" in cpu_flags()


def compiler_for_amx() -> list[str]:
    """Skips the test where the AMX kernels are not compiled, or the processor has no AVX-512."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    asked = subprocess.run([*compiler, "-dumpversion"], capture_output=True, text=True)
    if platform.machine() != "x86_64" or int(re.split(r"\D", asked.stdout)[0]) < 12:
        pytest.skip("AMX is compiled for x86-64, by gcc 11 or clang 12 or newer")
    if "avx512vl" not in cpu_flags():
        pytest.skip("this processor has no AVX-512, which every processor with AMX has")
    return compiler


def amx_test(directory: Path, sources: Path = SOURCES, *, is_quick: bool = False) -> Path:
    """is_quick: without optimizing."""
    program = directory / "amx_test"
    flags = [*FLAGS, "-O0"] if is_quick else FLAGS
    march = ["-march=x86-64-v4", *(["-mavx512vnni"] if "avx512_vnni" in cpu_flags() else [])]
    command = [*compiler_for_amx(), *flags, *march, f"-I{sources}", f"-I{HERE}"]
    source = HERE / "amx_test.c"
    subprocess.run(
        [*command, str(source), "-o", str(program), "-lm"], check=True, capture_output=True
    )
    return program


def test_amx_has_the_bits_of_plain_c(tmp_path: Path) -> None:
    """On this processor's AMX, or with each instruction emulated."""
    program = amx_test(tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("tiles.h", '"tdpbf16ps %%tmm" #b ", %%tmm" #a', '"tdpbf16ps %%tmm" #a ", %%tmm" #b'),
        ("tiles.h", "{16, 16, 16, 16, 16, 16, 16, 8}", "{16, 16, 16, 16, 16, 16, 16, 16}"),
        ("tiles.c", '"tilerelease" ::', '"" ::'),
        ("tiles.h", '"tdpbsud %%tmm" #b ", %%tmm" #a', '"tdpbsud %%tmm" #a ", %%tmm" #b'),
        ("tiles.h", "case 1: DOT(a, b, 1)", "case 1: DOT(a, b, 2)"),
        ("linear_tiles.h", "tile_load(t, 7, b + 64, PANEL_ROW", "tile_load(t, 7, b, PANEL_ROW"),
        ("attention_by_tiles.h", "together &= finite | alike", "together &= 1"),
    ],
)
def test_it_notices_a_fault(tmp_path: Path, file: str, right: str, wrong: str) -> None:
    shutil.copytree(SOURCES, tmp_path / "cpu")
    source = tmp_path / "cpu" / file
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    program = amx_test(tmp_path, tmp_path / "cpu", is_quick=True)
    done = subprocess.run([program, "quick"], capture_output=True, text=True, timeout=150)
    assert done.returncode in range(1, 99), done


ENGINE = """
import ctypes, sys
from quire import LLM, SamplingParams
from quire.kernels.cpu import tiles
emulator = ctypes.CDLL(sys.argv[1])
if sys.argv[2] == "AMX" and tiles.library.load_library().quire_ask_for_amx():
    emulator.amx_emulate()
tiles._choose = lambda wanted: tiles.TileChoice(tiles.Tiles[sys.argv[2]], "")
params = SamplingParams(max_tokens=6, temperature=0.7, seed=3, logprobs=1)
with LLM(cpu_threads=2) as llm:
    prompts = ["The capital of", "def add(a, b):", "Once upon a time"]
    for output in llm.generate(prompts, params, use_tqdm=False):
        print(output.outputs[0].token_ids, output.outputs[0].logprobs)
print(emulator.amx_instructions() > 0, file=sys.stderr)
"""


def test_an_engine_by_amx_has_the_logprobs_of_plain_c(tmp_path: Path) -> None:
    """Steps of the built-in model on two threads, with AMX instructions emulated where there are none."""
    emulator = tmp_path / "emulator.so"
    flags = ["-O2", "-shared", "-fPIC", f"-I{HERE}", "-x", "c", "-", "-o", str(emulator), "-lm"]
    source = '#define AMX_EXPORTED\n#include "amx_emulator.h"'
    subprocess.run([*compiler_for_amx(), *flags], input=source, check=True, text=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    outputs = {}
    for kind in Tiles:
        command = [sys.executable, "-c", ENGINE, str(emulator), kind.name]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=150, check=True
        )
        outputs[kind] = done.stdout
        assert done.stderr.endswith("True\n") == (kind is Tiles.AMX and not has_amx())
    assert outputs[Tiles.AMX] == outputs[Tiles.PLAIN]
    assert outputs[Tiles.AMX] != outputs[Tiles.NONE], "all are computed alike"


def test_plain_tiles_agree_with_themselves(native: NativeKernels) -> None:
    """So the check at the start fails only where AMX differs."""
    assert native._lib.quire_check_tiles(Tiles.PLAIN) == 0


def test_vectors_are_close_to_tiles_and_not_equal(native: NativeKernels) -> None:
    """The bounds of the check hold for another order of sums, and it tells them apart."""
    assert native._lib.quire_check_tiles(Tiles.NONE) == 1


@pytest.mark.parametrize(
    ("refusal", "verdict", "chosen"),
    [
        (0, 0, Tiles.AMX),
        (0, 1, Tiles.AMX),
        (0, 2, Tiles.NONE),
        (1, 0, Tiles.NONE),
        (2, 0, Tiles.NONE),
    ],
)
def test_amx_is_used_where_it_is_there_and_right(
    refusal: int,
    verdict: int,
    chosen: Tiles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Library:
        def quire_ask_for_amx(self) -> int:
            return refusal

        def quire_check_tiles(self, kind: Tiles) -> int:
            assert kind is Tiles.AMX
            return verdict

    monkeypatch.setattr(tiles.library, "load_library", Library)
    with caplog.at_level(logging.INFO):
        assert choose_tiles().tiles is chosen
        choose_tiles()
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == (1 if (refusal, verdict) == (0, 2) else 0)


def test_the_variable(monkeypatch: pytest.MonkeyPatch, native: NativeKernels) -> None:
    rng = generator(0)
    weight, x = (randn(n, 96, rng=rng, dtype=torch.bfloat16) for n in (70, 3))
    weight, x = (
        torch.cat((weight, -weight), dim=1),
        x.repeat(1, 2),
    )  # what is left of a sum shows its order
    results = []
    for value, kind in (("off", Tiles.NONE), ("plain", Tiles.PLAIN)):
        monkeypatch.setenv(VARIABLE, value)
        assert choose_tiles().tiles is kind
        product = PanelProduct(in_features=192, out_features=70, dtype=torch.bfloat16, bias=False)
        product.fill(0, weight)
        results.append(product(x))
        assert float(results[-1].abs().max()) < 1e-4
    assert not torch.equal(bits(results[0]), bits(results[1])), "both are computed alike"
    monkeypatch.setenv(VARIABLE, "on")
    with pytest.raises(ConfigError, match="QUIRE_CPU_TILES='on'"):
        choose_tiles()


def test_the_log_says_what_was_chosen_and_why(
    native: NativeKernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    with caplog.at_level(logging.INFO, logger="quire.kernels"):
        create_kernels()
    assert re.search(r"CPU kernels: \d+-bit vectors.*no tiles, by QUIRE_CPU_TILES", caplog.text)
