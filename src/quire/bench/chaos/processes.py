"""The server's processes, from /proc: found by a variable in their environment, which all of them inherit, so
that none is missed whose parent has been killed."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "QUIRE_CHAOS_RUN"
ROLES = {
    "quire.engine.core_process": "core",
    "quire.engine.worker_process": "worker",
    "quire.structured.check_process": "grammar check",
    "serve": "front end",
}
"""A word of the command line -> what the process is."""


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    role: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process has at one time."""

    memory: int
    """Bytes of its own and shared memory, without mapped files."""
    descriptors: int
    threads: int


def find(mark: str) -> list[Process]:
    """All processes of the run that are alive; a zombie is not."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with suppress(OSError):
            if wanted in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                words = Path("/proc", entry, "cmdline").read_bytes().decode("utf-8", "replace")
                found.append(Process(int(entry), _role(words.split("\0"))))
    return sorted(found, key=lambda process: process.pid)


def _role(words: list[str]) -> str:
    return next((role for word, role in ROLES.items() if word in words), "other")


def zombies(parents: list[int]) -> list[int]:
    """Processes that have ended, and that none of these has waited for."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError, ValueError):
                state, parent = _stat(int(entry))
                if state == "Z" and parent in parents:
                    found.append(int(entry))
    return found


def _stat(pid: int) -> tuple[str, int]:
    """(state, parent). The command's name, in parentheses, may have any characters."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return fields[0], int(fields[1])


def sample(pid: int) -> Sample | None:
    """None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines()
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        kib = sum(int(values.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))
        return Sample(kib * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(values["Threads"]))
    except (OSError, KeyError, ValueError):
        return None
