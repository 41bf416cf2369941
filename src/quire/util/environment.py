"""The environment of processes that this one starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from quire.util.logging import LEVELS


def child_environment() -> dict[str, str]:
    """This process's environment, with the package importable even if it is not installed, and with this
    process's log level."""
    environment = dict(os.environ)
    level = logging.getLogger("quire").getEffectiveLevel()
    environment["QUIRE_LOG_LEVEL"] = next(
        (name for name in LEVELS if level <= logging.getLevelName(name)), LEVELS[-1]
    )
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment
