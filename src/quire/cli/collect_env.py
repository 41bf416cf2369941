"""`quire collect-env`: facts for a bug report, without anything that identifies a person or machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quire.cli.parser import Parser
from quire.util.version import VERSION

PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "minijinja", "msgspec",
    "pyzmq", "fastapi", "starlette", "pydantic", "uvicorn", "httptools", "uvloop",
    "prometheus_client", "transformers", "openai",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "QUIRE_LOG_LEVEL", "QUIRE_CPU_TILES", "HF_HUB_OFFLINE", "CC",
)  # fmt: skip
"""Environment variables that affect Quire and are not secret."""


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire collect-env",
        usage="quire collect-env [--json]",
        description="Print versions and machine, for a bug report.",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    args = parser.parse_strictly(argv)
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(len(name) for name in facts) + 2
    for name, value in facts.items():
        print(f"{name:<{width}}{value}")
    return 0


def collect() -> dict[str, str]:
    """Facts by name, in reading order."""
    facts = {
        "quire": VERSION,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "memory": _memory(),
        "compiler": _first_line([shutil.which(os.environ.get("CC", "cc")) or "gcc", "--version"]),
        "kernels": _kernels(),
        "gpu": _first_line(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        ),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    for name in VARIABLES:
        if name in os.environ:
            facts[f"${name}"] = os.environ[name]
    return facts


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _kernels() -> str:
    """Compiles them if they have not been: the report should say whether that works."""
    try:
        from quire.kernels.select import describe_native

        return describe_native()
    except Exception as error:  # whatever is broken, the rest of the report is needed
        return f"reference ({error})"


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.1f} GiB"


def _first_line(command: list[str]) -> str:
    """The first line that a tool prints about itself, or that it is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none found"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "none found"
