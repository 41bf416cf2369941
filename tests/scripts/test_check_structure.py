"""Each rule about the package's shape fails where it should, on a package made for it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    path = ROOT / "scripts" / "check_structure.py"
    spec = importlib.util.spec_from_file_location("check_structure", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for package in (parent for parent in path.parents if parent.is_relative_to(folder)):
            (package / "__init__.py").touch()
    return folder


@pytest.mark.parametrize(
    "back",
    [
        "from {name}.a import x",
        "def f():\n    import {name}.a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {name} import a",
    ],
)
def test_a_circle(
    checker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str
) -> None:
    name = tmp_path.name  # of an identifier's letters; unlike that of any other package
    files = {"a.py": f"import {name}.b", "b.py": f"import {name}.c", "c.py": back.format(name=name)}
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / name, files)
    [problem] = checker.circles(name)
    assert problem.count("->") == 3
    write(tmp_path / name, {"c.py": ""})
    assert list(checker.circles(name)) == []


PLANS = """
from quire.messages import StepPlan, StepResult
class Future:
    def result(self) -> StepResult: ...
"""
RUNNER = """
class Runner:
    def launch(self, plan: StepPlan) -> Future:
        return Future(plan.rows)
"""


@pytest.mark.parametrize(
    "second",
    [
        "class Second:\n    def execute(self, plan: StepPlan) -> StepResult:\n        return plan.rows",
        "class Second:\n    def execute(self, plan: 'StepPlan') -> 'Future | None':\n"
        "        return self._run(plan)",
        "def second(plan: StepPlan) -> StepResult:\n    for row in plan.rows: ...",
    ],
)
def test_a_second_runner(checker: ModuleType, tmp_path: Path, second: str) -> None:
    write(tmp_path, {"runner.py": PLANS + RUNNER, "other.py": PLANS + second})
    [problem] = checker.second_runners(tmp_path)
    assert "(other.py)" in problem and "Runner (runner.py)" in problem


def test_what_is_no_second_runner(checker: ModuleType, tmp_path: Path) -> None:
    executor = """
class Executor(Protocol):
    def execute(self, plan: StepPlan) -> Future: ...
class Inline:
    def execute(self, plan: StepPlan) -> Future:
        assert self.worker is not None
        return Done(self.worker.execute(plan))
class MockExecutor:
    def execute(self, plan: StepPlan) -> Future:
        return plan.rows
class Scheduler:
    def update(self, plan: StepPlan, result: StepResult) -> list[int]:
        return plan.rows
"""
    write(tmp_path, {"runner.py": PLANS + RUNNER, "executor.py": PLANS + executor})
    assert list(checker.second_runners(tmp_path)) == []


def test_no_runner_is_reported_too(checker: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, {"runner.py": PLANS})
    [problem] = checker.second_runners(tmp_path)
    assert "found none" in problem


@pytest.mark.parametrize(
    "line",
    [
        "import ctypes",
        "from ctypes import byref",
        "from quire.kernels.cpu.native import NativeKernels",
        "from quire.kernels import cpu",
        "def f():\n    from quire.kernels.triton.backend import TritonKernels",
    ],
)
def test_kernels_in_models(checker: ModuleType, tmp_path: Path, line: str) -> None:
    write(tmp_path, {"models/llama.py": line, "layers/linear.py": line})
    [problem] = checker.kernels_in_models(tmp_path)
    assert problem.startswith("models/llama.py:")


def test_models_may_name_the_protocols(checker: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, {"models/llama.py": "from quire.kernels.ops import Ops\nimport torch"})
    assert list(checker.kernels_in_models(tmp_path)) == []


def test_a_long_family(checker: ModuleType, tmp_path: Path) -> None:
    registry = 'FAMILIES: Mapping[str, str] = {"A": "quire.models.a", "B": "quire.models.b"}'
    lines = checker.FAMILY_LINES
    write(
        tmp_path,
        {
            "models/registry.py": registry,
            "models/a.py": "x\n" * lines,
            "models/b.py": "x\n" * (lines + 1),
            "models/decoder.py": "x\n" * 500,  # no family
        },
    )
    [problem] = checker.long_families(tmp_path)
    assert problem.startswith("models/b.py has 121 lines")


@pytest.mark.parametrize(
    "upward",
    [
        "def f():\n    import quire.engine",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import quire.engine",
    ],
)
def test_the_layers_contract_counts_every_import(tmp_path: Path, upward: str) -> None:
    """import-linter with this project's own contracts, on a package with one import upward."""
    for path in (ROOT / "src" / "quire").iterdir():  # so that every layer has its modules
        name = f"{path.name}/base.py" if (path / "__init__.py").exists() else path.name
        if name.endswith(".py") and not name.startswith("__"):
            write(tmp_path / "quire", {name: ""})
    assert lint(tmp_path).returncode == 0
    write(tmp_path / "quire", {"kernels/base.py": upward})
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "quire.kernels.base -> quire.engine" in done.stdout


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as run; run()"
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(
        [sys.executable, "-c", code, *config],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(folder)},
    )


def test_the_package_keeps_the_rules(checker: ModuleType) -> None:
    problems = [
        *checker.circles("quire"),
        *checker.second_runners(checker.PACKAGE),
        *checker.kernels_in_models(checker.PACKAGE),
        *checker.long_families(checker.PACKAGE),
    ]
    assert problems == []
