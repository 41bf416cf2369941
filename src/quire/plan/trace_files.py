"""Reads recorded traffic: times, lengths and shared prefixes, never texts.

* CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens: the Azure LLM inference traces.
* JSONL with timestamp (milliseconds), input_length, output_length, hash_ids: Mooncake's traces, where an id
  stands for the next 512 tokens.
* JSONL with arrival (seconds), prompt_tokens, output_tokens.
* A log of `quire serve --request-log --log-format json`: a request came when it ended, less its seconds.
* JSON of `quire bench serve --save-detailed`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from quire.errors import ConfigError
from quire.plan.traces import CHUNK, TraceRequest

OWN = 1 << 29
"""From here on, contents that occur once."""


def read_trace(path: str) -> list[TraceRequest]:
    """In the order of their times, which begin at 0. Raises `ConfigError`, naming file and line."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"trace {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"trace {path} is not UTF-8 text.") from None
    start = text.lstrip()
    if start.startswith("["):
        raise ConfigError(
            f"trace {path} is a JSON list, as ShareGPT's file is: it has no times; give --trace sharegpt."
        )
    if not start.startswith("{"):
        found = list(_csv(path, text))
    elif start.partition("\n")[0].rstrip().endswith("}") and "start_times" not in text:
        found = list(_lines(path, text))
    else:
        found = list(_whole(path, text))
    if not found:
        raise ConfigError(f"trace {path} has no request.")
    found.sort(key=lambda request: request.time)
    first = found[0].time
    return [TraceRequest(r.time - first, r.prompt, r.output_len) for r in found]


def _csv(path: str, text: str) -> Iterator[TraceRequest]:
    rows = csv.DictReader(text.splitlines())
    for number, row in enumerate(rows, start=2):
        try:
            at = _moment(row["TIMESTAMP"].strip())
            lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{path} line {number}: expected TIMESTAMP, ContextTokens and GeneratedTokens."
            ) from None
        yield from _request(at, [(OWN + number, lengths[0])], lengths[1])


def _lines(path: str, text: str) -> Iterator[TraceRequest]:
    contents: dict[object, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise TypeError
            if "hash_ids" in entry:
                yield from _mooncake(entry, contents, OWN + number)
            elif "output_tokens" in entry and entry.get("output_tokens") is not None:
                at = float(entry["arrival"]) if "arrival" in entry else _arrival(entry)
                prompt = [(OWN + number, int(entry["prompt_tokens"]))]
                yield from _request(at, prompt, int(entry["output_tokens"]))
        except (KeyError, OverflowError, TypeError, ValueError):
            raise ConfigError(
                f"{path} line {number}: expected the fields of one of the forms in docs/simulate.md."
            ) from None


def _moment(text: str) -> float:
    """Without a zone it is taken for UTC: in a zone with summer time, gaps would change with the clock."""
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _arrival(entry: Mapping[str, object]) -> float:
    """Of a line of the request log, in whole seconds of its end."""
    return _moment(str(entry["time"])) - float(str(entry["e2e_seconds"]))


def _mooncake(
    entry: Mapping[str, object], contents: dict[object, int], own: int
) -> Iterator[TraceRequest]:
    ids = entry["hash_ids"]
    if not isinstance(ids, list):
        raise TypeError
    left, runs = int(str(entry["input_length"])), []
    for name in ids:
        if left > 0:
            content = contents.setdefault(name, len(contents) + 1)
            runs.append((content, min(CHUNK, left)))
        left -= CHUNK
    if left > 0:
        runs.append((own, left))
    at = float(str(entry["timestamp"])) / 1000
    yield from _request(at, runs, int(str(entry["output_length"])))


def _whole(path: str, text: str) -> Iterator[TraceRequest]:
    """The result of `quire bench serve --save-detailed`. Without failed requests."""
    try:
        entry = json.loads(text)
        rows = zip(
            entry["start_times"], entry["input_lens"], entry["output_lens"], entry["errors"],
            strict=True,
        )  # fmt: skip
        for number, (at, prompt, output, error) in enumerate(rows):
            if not error:
                yield from _request(float(at), [(OWN + number, int(prompt))], int(output))
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ConfigError(
            f"trace {path} is one JSON value, but not of quire bench serve --save-detailed."
        ) from None


def _request(at: float, runs: Iterable[tuple[int, int]], output_len: int) -> Iterator[TraceRequest]:
    """None for a request that has computed nothing. Raises `ValueError`: `at` is no time."""
    if not math.isfinite(at):
        raise ValueError
    kept = tuple((content, length) for content, length in runs if length > 0)
    if kept and output_len > 0:
        yield TraceRequest(at, kept, output_len)
