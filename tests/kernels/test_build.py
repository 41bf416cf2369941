from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.kernels.cpu import build as build_module
from quire.kernels.cpu import library
from quire.kernels.cpu.build import BuildError, build
from quire.kernels.cpu.native import NativeKernels
from quire.kernels.select import create_kernels


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a loader that has loaded nothing. What is compiled is not optimized: it takes 5
    seconds of a processor instead of 15."""
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(build_module.EXTRA_FLAGS_VARIABLE, "-O0")
    library._load_once.cache_clear()
    yield tmp_path / "cache"
    library._load_once.cache_clear()


def python(code: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_naming_the_package_does_not_load_torch() -> None:
    process = python("import sys, quire.kernels; sys.exit('torch' in sys.modules)")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


@pytest.mark.usefixtures("native")
def test_racing_processes_both_get_a_library(fresh_cache: Path) -> None:
    """And each maps one OpenMP runtime, torch's: one thread pool."""
    code = (
        "from quire.kernels.cpu.native import NativeKernels\n"
        "import torch\n"
        "x = torch.ones(200, 512)\n"
        "assert float(NativeKernels().rms_norm(x, torch.ones(512), 0.0)[0, 0]) == 1.0\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}\n"
        "print(len(maps), *maps)\n"
    )
    processes = [python(code) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        if sys.platform == "linux":
            assert out.startswith("1 "), out
    left = [path.name for path in (fresh_cache / "kernels").iterdir()]
    assert len(left) == 1 and left[0].startswith("quire-kernels-") and left[0].endswith(".so")


@pytest.mark.usefixtures("native")
def test_a_second_build_does_not_compile(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build()
    monkeypatch.setattr(build_module, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert build() == first
    assert first.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("native")
def test_the_name_follows_sources_flags_and_cpu(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = build_module.find_compiler()
    names = {build_module._fingerprint(compiler), build_module._fingerprint([*compiler, "-g"])}
    monkeypatch.setattr(build_module, "_cpu_identity", lambda: "another CPU")
    names.add(build_module._fingerprint(compiler))
    (tmp_path / "x.c").write_text("int x;")
    monkeypatch.setattr(build_module, "SOURCES", tmp_path)
    names.add(build_module._fingerprint(compiler))
    assert len(names) == 4


@pytest.mark.parametrize("compiler", ["/nonexistent", "false", "sh -c 'exit 1' --"])
def test_no_compiler(
    fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: str,
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING, logger="quire.kernels"):
        assert create_kernels("auto").name == "reference"
    assert [record.name for record in caplog.records] == ["quire.kernels"]
    with pytest.raises(ConfigError, match="CC"):
        create_kernels("native")


def test_a_failing_compile_says_why(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "cc"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *--version) exit 0;; esac\necho "x.c:1: error: no" >&2\nexit 1\n'
    )
    fake.chmod(0o700)
    monkeypatch.setenv("CC", str(fake))
    with pytest.raises(BuildError, match="error: no"):
        build()
    assert not list((fresh_cache / "kernels").iterdir())
    with pytest.raises(BuildError, match="error: no"):
        NativeKernels()
    monkeypatch.setattr(library, "build", lambda _: pytest.fail("a failed compile was tried again"))
    with pytest.raises(BuildError, match="error: no"):
        NativeKernels()


@pytest.mark.usefixtures("native")
def test_a_library_that_does_not_load(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_compile", lambda _, output: output.write_bytes(b"junk"))
    with pytest.raises(BuildError, match="does not load"):
        NativeKernels()


def test_a_cache_that_others_may_write_is_refused(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh_cache / "kernels").mkdir(parents=True)
    (fresh_cache / "kernels").chmod(0o777)
    monkeypatch.setattr(build_module, "_fingerprint", lambda _: "0")
    monkeypatch.setattr(build_module, "find_compiler", lambda: ["cc"])
    with pytest.raises(BuildError, match="chmod"):
        build()
    # Nor is a library that already lies there loaded: anyone may have put it there.
    (fresh_cache / "kernels" / "quire-kernels-0.so").touch()
    with pytest.raises(BuildError, match="chmod"):
        build()


def test_the_processor_is_named_as_its_compilers_want(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, flag in (("x86_64", "-march=native"), ("aarch64", "-mcpu=native")):
        monkeypatch.setattr(build_module.platform, "machine", lambda machine=machine: machine)
        assert build_module.machine_flag("native") == flag
        assert build_module.machine_flag("armv8-a") == "-march=armv8-a"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUIRE_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert build_module.cache_dir() == Path("/a/kernels")
    monkeypatch.delenv("QUIRE_CACHE_DIR")
    assert build_module.cache_dir() == Path("/b/quire/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build_module.cache_dir() == Path("/c/.cache/quire/kernels")


def test_names() -> None:
    assert create_kernels("reference").name == "reference"
    with pytest.raises(ConfigError, match="fast"):
        create_kernels("fast")  # type: ignore[arg-type]


def test_a_full_disk_is_named_and_not_a_line_of_the_compiler(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*) exit 0;; esac\n'
        'echo "x.c:1: fatal error: error writing to x.s: No space left on device" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(BuildError, match=rf"no space left .* in {fresh_cache}/kernels .* or "):
        build()


def test_no_compiler_says_how_to_get_one(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh_cache))
    with pytest.raises(BuildError, match="apt install gcc"):
        build()


@pytest.mark.usefixtures("native")
def test_the_wait_of_a_first_start_is_announced_even_if_it_began_before_the_log(
    fresh_cache: Path,
) -> None:
    del fresh_cache  # the environment variable is what counts: the child compiles
    code = "from quire.engine.llm import LLM\nLLM(engine='process').close()"
    setup = "from quire.util.logging import setup_logging\nsetup_logging(level='INFO')\n"
    process = python(setup + code)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.count("compiling the CPU kernels") == 1


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("linear_panel.h", "vfma(wv[half][i], xv, acc[r][i])", "wv[half][i] * xv + acc[r][i] + xv"),
        ("codes.c", "codes[half], x[r], 2 * e + half", "codes[1 - half], x[r], 2 * e + half"),
    ],
)
def test_kernels_that_compute_wrong_products_are_not_used(
    native: NativeKernels,
    fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    file: str,
    right: str,
    wrong: str,
) -> None:
    """As after a compiler's fault."""
    sources = shutil.copytree(build_module.SOURCES, tmp_path / "cpu")
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(build_module, "SOURCES", sources)
    with pytest.raises(BuildError, match="wrong products"):
        NativeKernels()
    assert create_kernels().name == "reference"
