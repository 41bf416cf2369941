"""The source rules find what they forbid, and the package keeps them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_source.py"


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_source", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal",
        "from pickle import loads",
        "def f():\n    from cloudpickle import dumps",
        "eval('1')",
        "exec(code)",
        "torch.load(path)",
        "yaml.load(text)",
        "os.system('ls')",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_forbidden(checker: ModuleType, tmp_path: Path, monkeypatch, source: str) -> None:
    monkeypatch.setattr(checker, "PACKAGE", tmp_path / "src" / "quire")
    path = tmp_path / "src" / "quire" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("x = 1\n" + source)
    [problem] = checker.violations(path)
    assert problem.startswith("src/quire/x.py:")


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "yaml.safe_load(text)",
        "safetensors.torch.load_file(x)",
        "f(trust_remote_code=False)",
        "# import pickle",
        "'torch.load(x)'",
    ],
)
def test_allowed(checker: ModuleType, tmp_path: Path, monkeypatch, source: str) -> None:
    monkeypatch.setattr(checker, "PACKAGE", tmp_path)
    path = tmp_path / "x.py"
    path.write_text(source)
    assert list(checker.violations(path)) == []


def test_the_package_keeps_the_rules(checker: ModuleType) -> None:
    problems = [p for path in checker.PACKAGE.rglob("*.py") for p in checker.violations(path)]
    assert problems == []


def test_sizes_are_of_python_and_c_by_area(checker: ModuleType, tmp_path: Path) -> None:
    for name in ["engine/core.py", "kernels/cpu/pool.c", "kernels/cpu/pool.h", "server/app.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a\n\n# b\n")
    (tmp_path / "builtin.json").write_text("{\n}\n")
    assert checker.sizes(tmp_path) == {"engine": 9, "package": 12}


@pytest.mark.parametrize(("area", "limit"), [("engine", 2), ("package", 3)])
def test_a_size_over_its_limit(
    checker: ModuleType, tmp_path: Path, monkeypatch, area: str, limit: int
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "app.py").write_text("x\n")
    (tmp_path / "core.py").write_text("x\ny\n")
    assert checker.too_large(tmp_path) == []
    monkeypatch.setitem(checker.SIZE_LIMITS, area, limit)
    assert checker.too_large(tmp_path) == []
    monkeypatch.setitem(checker.SIZE_LIMITS, area, limit - 1)
    [problem] = checker.too_large(tmp_path)
    assert area in problem
