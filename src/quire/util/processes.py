"""How child processes end."""

from __future__ import annotations

import contextlib
import signal


def ending(status: int) -> str:
    """Of a process with this `returncode`, as the rest of a sentence."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal. False if it is not there, or cannot be asked."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def processor_ticks(pid: int) -> int:
    """The processor time that a process has used, in hundredths of a second; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])  # utime, stime: see proc(5)


def out_of_memory_kills() -> int:
    """How many processes of this machine the kernel has ended for lack of memory; 0 if it does not say."""
    try:
        with open("/proc/vmstat") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
