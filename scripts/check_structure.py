"""Rules about the shape of the package that no linter has. Each returns lines that say what broke it.

1. No circle of imports between modules, imports inside functions and under TYPE_CHECKING counted.
   (That nothing is imported upward is import-linter's contract in pyproject.toml; it counts them too.)
2. One class turns a `StepPlan` into a `StepResult`: a second one means that every feature is written twice.
3. `models/` imports no kernels but the protocols of operations, and no C library.
4. A family's file in `models/` is short: what is new in a family is parts in `layers/`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "quire"

STAND_INS = {"MockExecutor", "ScriptedFuture", "SimulatedExecutor"}
"""Executors without a model."""
OPEN_TO_MODELS = {f"quire.kernels.{name}" for name in ("base", "group", "lora", "ops", "program")}
"""The modules of kernels/ that models may import: the protocols they are written against."""
C_LIBRARIES = {"ctypes", "cffi"}
FAMILY_LINES = 120


def circles(package: str) -> Iterator[str]:
    graph = grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    found = set()
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            chain = graph.find_shortest_chain(importer=imported, imported=module)
            if chain and frozenset(chain) not in found:
                found.add(frozenset(chain))
                yield f"import circle: {' -> '.join((module, *chain))}"


def second_runners(folder: Path) -> Iterator[str]:
    running = runners(folder)
    real = sorted(set(running) - STAND_INS)
    if len(real) != 1:
        places = ", ".join(f"{name} ({running[name]})" for name in real) or "none"
        yield f"one class should turn a StepPlan into a StepResult; found {places}"


def runners(folder: Path) -> dict[str, str]:
    """Name -> file of each class that has a method, and of each function, from `StepPlan` to `StepResult` or
    to a future of it. An executor or a worker that only hands the plan to another object is none."""
    functions = list(_functions(folder))
    results = {"StepResult"} | {
        owner
        for owner, function, _ in functions
        if function.name == "result" and _names(function.returns) == {"StepResult"}
    }
    return {
        owner: place
        for owner, function, place in functions
        for arg in function.args.args + function.args.kwonlyargs
        if _names(function.returns) & results
        and "StepPlan" in _names(arg.annotation)
        and _is_read(arg.arg, function)
    }


def _functions(folder: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Each method under its class's name and each function under its own, with its file."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.ClassDef | ast.Module):
                for child in node.body:
                    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                        owner = node.name if isinstance(node, ast.ClassDef) else child.name
                        yield owner, child, str(path.relative_to(folder))


def _names(node: ast.AST | None) -> set[str]:
    """The names in an annotation, quoted or not."""
    names = set()
    for part in ast.walk(node) if node is not None else ():
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute):
            names.add(part.attr)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            names |= _names(ast.parse(part.value, mode="eval"))
    return names


def _is_read(plan: str, function: ast.AST) -> bool:
    """Whether `plan` is used other than as an argument of another object's method."""
    handed_on = {
        id(value)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if not (isinstance(call.func.value, ast.Name) and call.func.value.id == "self")
        for value in (*call.args, *(keyword.value for keyword in call.keywords))
    }
    return any(
        isinstance(node, ast.Name) and node.id == plan and id(node) not in handed_on
        for node in ast.walk(function)
    )


def kernels_in_models(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "models").rglob("*.py")):
        for node in ast.walk(_parse(path)):
            for module in _imported(node):
                closed = f"{module}.".startswith("quire.kernels.") and module not in OPEN_TO_MODELS
                if module.split(".")[0] in C_LIBRARIES or closed:
                    place = f"{path.relative_to(folder)}:{node.lineno}"  # type: ignore[attr-defined]
                    yield f"{place}: {module}: a model is written in operations, not in kernels"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.module == "quire.kernels":
            return [f"quire.kernels.{alias.name}" for alias in node.names]
        return [node.module or ""]
    return []


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def long_families(folder: Path) -> Iterator[str]:
    """The files that the registry's FAMILIES names."""
    registry = _parse(folder / "models" / "registry.py")
    table = next(
        node.value
        for node in registry.body
        if isinstance(node, ast.AnnAssign) and _names(node.target) == {"FAMILIES"} and node.value
    )
    for module in sorted(set(ast.literal_eval(table).values())):
        path = folder.joinpath(*module.split(".")[1:]).with_suffix(".py")
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FAMILY_LINES:
            yield f"{path.relative_to(folder)} has {lines} lines; a family's file has {FAMILY_LINES} at most"


def main() -> int:
    problems = [
        *circles("quire"),
        *second_runners(PACKAGE),
        *kernels_in_models(PACKAGE),
        *long_families(PACKAGE),
    ]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
