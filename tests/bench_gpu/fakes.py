"""A part of the suite whose cases go wrong in every way."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from bench.gpu.suite import Case, Entry, Options, Values


def cases(options: Options, entries: Sequence[Entry]) -> list[Case]:
    return [
        Case("good", _good, remedy="none"),
        Case("raises", _raise, remedy="raise it"),
        Case("after raising", _good),
        Case("wrong", lambda: {"ok": False, "error": {"x": 1.0}}, remedy="right it"),
        Case("dies", lambda: os._exit(3)),
        Case("hangs", _hang, limit_s=0.5),
        Case("last", lambda: _good() | {"seen": [entry["name"] for entry in entries]}),
    ]


def _good() -> Values:
    return {"pid": os.getpid()}


def _raise() -> Values:
    raise ValueError("on purpose")


def _hang() -> Values:
    time.sleep(60)
    return {}
