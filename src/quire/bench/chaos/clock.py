"""The wall clock of the server's processes: a C library that is preloaded, and a file with seconds.

What is covered is written at the head of clock.c. Without a C compiler the clock cannot be moved.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")
_SECONDS = struct.Struct("<q")


class WallClock:
    """`reason` says why it cannot be moved; empty: it can."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self._library = folder / "clock.so"
        self.shift = 0
        self.reason = self._build()
        self.set(0)

    def _build(self) -> str:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            return "there is no C compiler"
        done = subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", str(self._library), str(SOURCE)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return (
            "" if done.returncode == 0 else f"{SOURCE.name} does not compile: {done.stderr[:200]}"
        )

    @property
    def environment(self) -> dict[str, str]:
        """For the server; beside what is preloaded anyway."""
        if self.reason:
            return {}
        others = os.environ.get("LD_PRELOAD", "")
        preload = f"{self._library}:{others}" if others else str(self._library)
        return {"LD_PRELOAD": preload, "QUIRE_CHAOS_CLOCK": str(self._file)}

    def set(self, seconds: int) -> None:
        """From now on the processes' wall clock is this much ahead. Written in place: they have it mapped."""
        self.shift = seconds
        fd = os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.pwrite(fd, _SECONDS.pack(seconds), 0)
        finally:
            os.close(fd)
