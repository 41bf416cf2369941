"""Logging of `quire`: few lines, one per event, as text or as JSON.

A library must not configure logging for its host program, so importing Quire sets up nothing. The
commands call `setup_logging` once at their start, and so does each process that they start.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TextIO

from quire.errors import ConfigError
from quire.util.terminal import printable

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
FORMATS = ("text", "json")

_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(
    *,
    log_format: str = "text",
    level: str | None = None,
    stream: TextIO | None = None,
) -> None:
    """Send the loggers of Quire and of its HTTP server to `stream` (stderr). Calling it again replaces
    the earlier set-up. Of uvicorn's own messages only warnings are shown, because Quire logs itself where
    it listens. The access log is controlled by `disable_uvicorn_access_log`.

    `level` defaults to the environment's QUIRE_LOG_LEVEL, then INFO. Raises `ConfigError` for a level or
    format that does not exist.
    """
    wanted = (level or os.environ.get("QUIRE_LOG_LEVEL") or "INFO").upper()
    if wanted not in LEVELS:
        raise ConfigError(f"QUIRE_LOG_LEVEL must be one of {', '.join(LEVELS)}, got {wanted!r}.")
    if log_format not in FORMATS:
        raise ConfigError(f"log_format must be one of {', '.join(FORMATS)}, got {log_format!r}.")
    for name, handler_level in (
        ("quire", "NOTSET"),
        ("uvicorn.error", "WARNING"),
        ("uvicorn.access", wanted),
    ):
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
        handler.setLevel(handler_level)
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("quire").setLevel(wanted)


class TextFormatter(logging.Formatter):
    """`12:34:56 INFO engine: message`. Control characters are escaped: a message may contain a client's
    text, which must not forge a second line or control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("quire.").partition(".")[0]
        message = printable(record.getMessage())
        line = f"{clock} {record.levelname:<7} {name}: {message}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {k: v for k, v in vars(record).items() if k not in _STANDARD_FIELDS}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)
