"""Log lines: one per event, no forged ones, silent until asked."""

from __future__ import annotations

import io
import json
import logging

import pytest

from quire.errors import ConfigError
from quire.util.logging import setup_logging


def lines_of(message: str, *args: object, log_format: str = "text", **extra: object) -> list[str]:
    stream = io.StringIO()
    setup_logging(log_format=log_format, level="INFO", stream=stream)
    logging.getLogger("quire.engine.core").info(message, *args, extra=extra or None)
    return stream.getvalue().splitlines()


def test_a_text_line() -> None:
    [line] = lines_of("loaded %d blocks", 7)
    assert line.endswith(" INFO    engine: loaded 7 blocks")


def test_what_a_client_sent_cannot_forge_a_line_or_move_the_cursor() -> None:
    [line] = lines_of("request %s", "a\n12:00:00 ERROR   core: dead\r\x1b[2J\u2028\x9b31m")
    assert "\\n12:00:00" in line
    assert not {"\x1b", "\r", "\u2028", "\x9b"} & set(line)


def test_json_lines_are_objects_with_the_extras() -> None:
    [line] = lines_of("done\n%s", "x", log_format="json", request_id="r1", tokens=3)
    entry = json.loads(line)
    assert entry["message"] == "done\nx"
    assert (entry["level"], entry["logger"]) == ("info", "quire.engine.core")
    assert (entry["request_id"], entry["tokens"]) == ("r1", 3)


def test_json_carries_the_traceback_in_one_line() -> None:
    stream = io.StringIO()
    setup_logging(log_format="json", stream=stream)
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logging.getLogger("quire").exception("failed")
    [line] = stream.getvalue().splitlines()
    assert "boom" in json.loads(line)["exception"]


def test_setting_up_twice_does_not_double_the_lines() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)
    setup_logging(stream=stream)
    logging.getLogger("quire").warning("once")
    assert stream.getvalue().count("once") == 1


def test_the_level_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "warning")
    stream = io.StringIO()
    setup_logging(stream=stream)
    logging.getLogger("quire").info("quiet")
    assert stream.getvalue() == ""


def test_levels_and_formats_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="log_format"):
        setup_logging(log_format="xml")
    monkeypatch.setenv("QUIRE_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="QUIRE_LOG_LEVEL"):
        setup_logging()
