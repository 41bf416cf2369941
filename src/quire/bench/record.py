"""The facts in every benchmark's JSON: commit, machine, versions, command, date.

Without them, figures cannot be compared later. It uses only the standard library and imports no package
to learn its version, so that it also works in another engine's environment.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quire.util.version import VERSION

SECRET_FLAGS = ("--api-key", "--admin-api-key", "--hf-token", "--header")
"""Flags whose values are secret."""

PACKAGES = ("torch", "numpy", "tokenizers", "uvicorn", "uvloop", "httptools")

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "LD_PRELOAD")
"""Environment variables that affect CPU figures."""


def run_record(
    argv: Sequence[str] | None = None, *, packages: Sequence[str] = PACKAGES
) -> dict[str, object]:
    """Facts for a benchmark's JSON, ready for `json.dumps`.

    `argv` is the command line (default: this process's). Keys: `date` (UTC, ISO 8601), `commit` (None
    outside a checkout), `dirty` (tracked files differ from it), `command`, `machine`, `versions`,
    `environment`.
    """
    commit, dirty = _commit()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "command": command_line(argv),
        "machine": machine(),
        "versions": versions(packages),
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as it can be pasted into a shell, without secrets."""
    words = list(sys.argv if argv is None else argv)
    if words and argv is None:
        name = Path(words[0]).name
        words[0] = "quire" if name in ("quire", "__main__.py") else words[0]
    hidden = False
    shown = []
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = flag.replace("_", "-") in SECRET_FLAGS
        if hidden and not word.startswith("--"):
            shown.append("REDACTED")
        elif secret and equals:
            shown.append(f"{flag}=REDACTED")
        else:
            shown.append(word)
        hidden = (secret and not equals) or (hidden and not word.startswith("--"))
    return shlex.join(shown)


def machine() -> dict[str, object]:
    """Processor, cores, memory, system. Never the host's name."""
    info = _cpuinfo()
    cores = {(cpu.get("physical id", "0"), cpu.get("core id", n)) for n, cpu in enumerate(info)}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = {cpu["model name"] for cpu in info if "model name" in cpu}
    return {
        "cpu": ", ".join(sorted(names)) or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "cpus_usable": usable,
        "physical_cores": len(cores) or None,
        "memory_gib": _memory_gib(),
        "load_average": _load_average(),
        "system": platform.platform(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Quire's, Python's and each package's version; None where it is not installed."""
    found: dict[str, str | None] = {"quire": VERSION, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout with this file, and whether the checkout has changes."""
    here = Path(__file__).resolve().parent
    commit = _git(here, "rev-parse", "HEAD")
    if not commit or _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None  # installed, perhaps inside another project's checkout
    status = _git(here, "status", "--porcelain", "--untracked-files=no")
    return commit, bool(status)


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpuinfo() -> list[dict[str, str]]:
    """One mapping per logical processor; empty if there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    processors = []
    for part in text.split("\n\n"):
        pairs = (line.partition(":") for line in part.splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        if "processor" in fields:
            processors.append(fields)
    return processors


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (OSError, ValueError):
        return None


def _load_average() -> list[float] | None:
    """The load average: figures that were taken with a load above 1 per core are doubtful."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None
