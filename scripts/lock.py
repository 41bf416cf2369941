"""Write requirements/*.txt: the exact versions of what is installed here and reachable from pyproject.

Run it in a virtual environment whose tests pass; what CI and `make demo` then install is what passed.
The local part of a version (torch's "+cpu") is dropped, so that the pin also finds a CUDA build.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

# Installed by its own name on top of the closure: torch needs it from Python 3.12 on, where a new
# virtual environment has none, and its metadata asks for it only there.
ALSO = ["setuptools"]


def closure(requirements: list[str]) -> dict[str, str]:
    """Name -> version of `requirements` and everything they need."""
    pins: dict[str, str] = {}
    pending = [(Requirement(text), "") for text in requirements]
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found = distribution(name)
        new = name not in pins
        pins[name] = found.version.partition("+")[0]
        if new or requirement.extras:
            extras = requirement.extras or {""}
            for text in found.requires or []:
                pending.extend((Requirement(text), wanted) for wanted in extras)
    return pins


def write(name: str, pins: dict[str, str], about: str) -> None:
    lines = [f"# {about} Written by scripts/lock.py (`make lock`)."]
    lines += [f"{package}=={version}" for package, version in sorted(pins.items())]
    path = ROOT / "requirements" / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(pins)} packages")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    runtime = closure([*project["dependencies"], *extras["fast"], *ALSO])
    dev = closure(extras["dev"])
    write("lock.txt", runtime, "What Quire runs on.")
    write(
        "dev-lock.txt",
        {name: version for name, version in dev.items() if name not in runtime},
        "What its tests and checks need besides.",
    )


if __name__ == "__main__":
    main()
