"""Source rules that no linter has: calls that run code from data, and the size of the package.

Quire reads checkpoints, templates and requests that strangers wrote. Unpickling, `eval` or importing
from any of them is code execution, so such calls are not allowed anywhere in the package, not even
where they look harmless: the next edit may move untrusted data there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "quire"
ABOVE_THE_ENGINE = {"server", "cli", "bench", "plan", "integrations"}
SIZE_LIMITS = {"engine": 69_000, "package": 94_000}
"""Lines of Python and C, blank lines and comments included; docs/adr/0021 gives the reasons. The engine is
the package without the folders above it."""

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_CALLS = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("os", "system"),
}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle"}
"""Passing these as true to a library hands it the right to run what it read."""


def violations(path: Path) -> Iterator[str]:
    """`file:line: what`, for each rule broken in one file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        found = _violation(node)
        if found:
            yield f"{path.relative_to(PACKAGE.parent.parent)}:{node.lineno}: {found}"


def _violation(node: ast.AST) -> str | None:
    if isinstance(node, ast.Import):
        modules = [alias.name.split(".")[0] for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [(node.module or "").split(".")[0]]
    else:
        modules = []
    for module in modules:
        if module in FORBIDDEN_MODULES:
            return f"import of {module}: it runs code from the data it reads"
    if not isinstance(node, ast.Call):
        return None
    target = node.func
    if isinstance(target, ast.Name) and target.id in FORBIDDEN_NAMES:
        return f"{target.id}(): it runs code from data"
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
        name = (target.value.id, target.attr)
        if name in FORBIDDEN_CALLS:
            return f"{'.'.join(name)}(): it runs code from data"
    for keyword in node.keywords:
        literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg in FORBIDDEN_KEYWORDS and literal is True:
            return f"{keyword.arg}=True: it runs code from data"
    return None


def sizes(package: Path) -> dict[str, int]:
    """The lines of each area in SIZE_LIMITS."""
    lines = dict.fromkeys(SIZE_LIMITS, 0)
    for path in package.rglob("*"):
        if path.suffix in {".py", ".c", ".h"}:
            count = len(path.read_text(encoding="utf-8").splitlines())
            lines["package"] += count
            if path.relative_to(package).parts[0] not in ABOVE_THE_ENGINE:
                lines["engine"] += count
    return lines


def too_large(package: Path) -> list[str]:
    return [
        f"the {area} has {lines:,} lines of Python and C; the limit is {SIZE_LIMITS[area]:,}"
        for area, lines in sizes(package).items()
        if lines > SIZE_LIMITS[area]
    ]


def main() -> int:
    if "--report" in sys.argv:
        for area, lines in sizes(PACKAGE).items():
            print(f"  size  {area:8}{lines:,} of {SIZE_LIMITS[area]:,} lines")
        return 0
    problems = [problem for path in sorted(PACKAGE.rglob("*.py")) for problem in violations(path)]
    problems += too_large(PACKAGE)
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
