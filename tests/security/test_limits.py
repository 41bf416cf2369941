"""SECURITY.md's table of limits is what the code does: defaults, options and answers."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.security.bodies import USER

from quire.config import engine_options, server_options

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in TEXT.partition("\n## Limits\n")[2].partition("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| limit |")
]
OPTIONS = {info.flag: info for info in [*engine_options(), *server_options()]}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PLACES = {where.strip("`"): int(answer) for _, _, where, answer in ROWS if answer.isdigit()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_default_is_the_codes(row):
    _, default, where, _ = row
    name = where.strip("`")
    if name.startswith("--"):
        value = OPTIONS[name].default
    else:
        module, _, constant = name.rpartition(".")
        value = getattr(importlib.import_module(module), constant)
    assert str(value) == default


def test_every_limit_of_the_server_is_in_the_table():
    named = {where.strip("`") for _, _, where, _ in ROWS}
    limits = {
        flag
        for flag, info in OPTIONS.items()
        if info.name.startswith("max_") and info.group == "server"
    }
    assert limits <= named


TOOL = {"type": "function", "function": {"name": "f"}}
BEYOND: dict[str, tuple[str, dict[str, object]]] = {
    "--max-body-bytes": (COMPLETIONS, {"prompt": "x" * (8 << 20)}),
    "--max-prompts-per-request": (COMPLETIONS, {"prompt": ["a"] * 1025}),
    "--max-sequences-per-request": (COMPLETIONS, {"prompt": ["a"] * 2, "n": 8193}),
    "quire.server.requests.MAX_MESSAGES": (CHAT, {"messages": [USER] * 8193}),
    "quire.server.requests.MAX_CONTENT_PARTS": (
        CHAT, {"messages": [{"role": "user", "content": ["a"] * 1025}]}
    ),
    "quire.server.requests.MAX_TOOLS": (CHAT, {"messages": [USER], "tools": [TOOL] * 1025}),
    "quire.server.requests.MAX_IDS": (COMPLETIONS, {"prompt": [2] * (2**20 + 1)}),
    "--max-stop-strings": (COMPLETIONS, {"prompt": "a", "stop": list("abcde")}),
    "--max-bad-words": (COMPLETIONS, {"prompt": "a", "bad_words": [f"x{i}" for i in range(129)]}),
    "--max-list-items": (COMPLETIONS, {"prompt": "a", "allowed_token_ids": [2] * (2**18 + 1)}),
    "quire.sampling_params.MAX_LOGPROB_IDS": (
        COMPLETIONS, {"prompt": "a", "logprobs": 1, "logprob_token_ids": list(range(129))}
    ),
    "quire.text.chat_template.MAX_KWARGS": (
        CHAT, {"messages": [USER], "chat_template_kwargs": {f"k{i}": 1 for i in range(65)}}
    ),
}  # fmt: skip
"""A request beyond each."""
TEMPLATES = "security/test_templates.py::test_fuel_and_output_are_limited_on_every_route"
CHECKER = "structured/test_store.py::test_the_checker_says_what_is_good_and_outlives_what_is_bad"
ELSEWHERE = {
    "quire.server.body.BODY_TIMEOUT": None,  # below
    "quire.server.process.MAX_HEAD_BYTES": "server/test_live.py::test_endless_headers_are_cut_off",
    "quire.text.chat_template.DEFAULT_FUEL": TEMPLATES,
    "quire.text.chat_template.DEFAULT_MAX_OUTPUT_CHARS": TEMPLATES,
    "--max-grammar-bytes": "structured/test_schema.py::test_the_limit_is_an_option",
    "quire.structured.checker.MAX_CHECK_SECONDS": CHECKER,
    "--max-num-queued-reqs": "server/test_errors.py::test_queue_full",
    "--shutdown-timeout": "server/test_live.py::test_what_does_not_finish_is_told",
}  # fmt: skip


def test_every_answer_is_tested():
    assert PLACES.keys() == BEYOND.keys() | ELSEWHERE.keys()
    for test in filter(None, ELSEWHERE.values()):
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("where", BEYOND)
async def test_the_answer_is_the_codes(client, engine, where):
    path, body = BEYOND[where]
    answer = await client.post(path, json=body)
    assert answer.status_code == PLACES[where], answer.text[:300]
    assert answer.json()["error"]["param"] and engine.submitted == []


async def test_a_body_that_does_not_arrive(client, monkeypatch):
    monkeypatch.setattr("quire.server.body.BODY_TIMEOUT", 0.01)

    async def slow():
        import asyncio

        yield b"{"
        await asyncio.sleep(30)

    answer = await client.post(
        COMPLETIONS, content=slow(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == PLACES["quire.server.body.BODY_TIMEOUT"]


def test_a_changed_default_is_noticed(monkeypatch):
    flag = "--max-stop-strings"
    monkeypatch.setitem(OPTIONS, flag, replace(OPTIONS[flag], default=5))
    (row,) = (row for row in ROWS if flag in row[2])
    with pytest.raises(AssertionError):
        test_the_default_is_the_codes(row)


def test_links_and_files_exist():
    for target in re.findall(r"\]\(([^)#]+)", TEXT) + re.findall(
        r"`((?:scripts|tests|requirements)/[\w./-]+)`", TEXT
    ):
        assert (ROOT / target).exists(), target
