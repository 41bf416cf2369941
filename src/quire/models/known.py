"""The sizes of public models, to plan with before anything is downloaded: the fields of their config.json
that decide the shape, as published."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from quire.errors import ConfigError

FILE = Path(__file__).with_name("known.json")
"""By name. `like` names another model, whose fields count where an entry has none of its own."""


def known_names() -> list[str]:
    return list(_entries())


def known_config(name: str) -> dict[str, object]:
    """name: without the owner, in any case: llama-3.1-70b, Qwen/Qwen3-8B. Raises `ConfigError`."""
    entries = _entries()
    key = name.rpartition("/")[2].lower()
    if key not in entries:
        close = difflib.get_close_matches(key, entries, n=3, cutoff=0.5)
        names = " or ".join(close) if close else ", ".join(entries)
        raise ConfigError(
            f"hf_config {name!r} is neither a directory, nor a config.json, nor a known model; try {names}."
        )
    return _fields(entries, key)


def _entries() -> dict[str, dict[str, object]]:
    entries: dict[str, dict[str, object]] = json.loads(FILE.read_text(encoding="utf-8"))
    return entries


def _fields(entries: dict[str, dict[str, object]], key: str) -> dict[str, object]:
    own = dict(entries[key])
    like = own.pop("like", None)
    return {**_fields(entries, str(like)), **own} if like is not None else own
