"""What a run is asked to do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quire.errors import ConfigError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    seconds: float = 300.0
    """How long faults are drawn; the last of them, and the end of the run, come after it."""
    seed: int = 0
    """Of the order of faults and of all that they choose."""
    faults: tuple[str, ...] = ()
    """Their names; none: all."""
    concurrency: int = 6
    """Requests in flight while nothing else is sent."""
    model: str = ""
    """As for `quire serve`; empty: the built-in one."""
    tensor_parallel_size: int = 1


def parse_duration(text: str) -> float:
    """Seconds: 90, 30s, 5m, 1h. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise ConfigError(f"--duration is a time such as 30s, 5m or 1h, got {text!r}.")
    return seconds
