"""What a fresh clone relies on: a Python is found or the message helps, the locks agree with pyproject."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {package: Version(version) for package, version in pairs}


def fake_python(folder: Path, name: str, *, version: str, good: bool) -> None:
    script = folder / name
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" && exit 0\nexit {int(not good)}\n'
    )
    script.chmod(0o755)


def find_python(path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(ROOT / "scripts" / "find-python")],
        env={"PATH": f"{path}:/usr/sbin"} | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with nothing but `head`."""
    head = next(p for p in (Path("/usr/bin/head"), Path("/bin/head")) if p.exists())
    (tmp_path / "head").symlink_to(head)
    return tmp_path


def test_a_newer_python_is_found_behind_an_old_python3(tools: Path) -> None:
    fake_python(tools, "python3", version="3.9.2", good=False)
    fake_python(tools, "python3.12", version="3.12.1", good=True)
    done = find_python(tools)
    assert (done.returncode, done.stdout.strip()) == (0, str(tools / "python3.12"))


def test_too_old_says_so_and_what_to_do(tools: Path) -> None:
    fake_python(tools, "python3", version="3.9.2", good=False)
    done = find_python(tools)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "needs Python 3.11 or newer" in done.stderr
    assert "python3 (Python 3.9.2)" in done.stderr
    assert "make PYTHON=" in done.stderr


def test_no_python_at_all(tools: Path) -> None:
    assert "no Python at all" in find_python(tools).stderr


def test_a_named_python_is_used_alone(tools: Path) -> None:
    fake_python(tools, "python3", version="3.12.0", good=True)
    fake_python(tools, "mine", version="3.9.0", good=False)
    assert find_python(tools, PYTHON="mine").returncode == 1


def test_the_runtime_lock_meets_the_declared_floors() -> None:
    locked = pins("lock.txt")
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["fast"]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is not in requirements/lock.txt: make lock"
        assert locked[name] in requirement.specifier


def test_the_dev_lock_adds_the_rest_and_repeats_nothing() -> None:
    runtime, dev = pins("lock.txt"), pins("dev-lock.txt")
    assert not runtime.keys() & dev.keys()
    for text in PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert (runtime | dev)[name] in requirement.specifier


def test_torch_is_pinned_without_a_build_so_that_cuda_builds_match_too() -> None:
    assert pins("lock.txt")["torch"] == Version("2.13.0")
    assert Requirement(PROJECT["dependencies"][0]).name == "torch"


@pytest.mark.parametrize("script", ["scripts/find-python", "scripts/check", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    shell = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#!").split()
    assert subprocess.run([*shell, "-n", str(path)], check=False).returncode == 0
