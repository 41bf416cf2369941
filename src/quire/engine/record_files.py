"""Files of the record of decisions, for operators."""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger("quire.engine")

_numbers = itertools.count(1)


def save(directory: str | None, records: Iterable[bytes], why: str) -> list[Path]:
    """Write each to a file of its own that only this user can read. directory: None for the one of temporary
    files. Never raises: an error is logged."""
    paths = []
    for data in records:
        name = f"quire-record-{os.getpid()}-{next(_numbers)}.bin"
        path = Path(directory or tempfile.gettempdir()).expanduser() / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
        except OSError as error:
            logger.error("the record of decisions could not be written to %s: %s", path, error)
            continue
        logger.warning("%s: the record of decisions is in %s", why, path)
        paths.append(path)
    return paths
