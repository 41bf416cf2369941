"""`quire demo` whole: a server in a process of its own, conversations over HTTP, figures, a clean end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

DUMMY = ("--load-format", "dummy")
"""Random weights answer at length, so that the conversations really overlap."""


def children_of(pid: int) -> set[int]:
    """Descendants, by pid."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {pid}
    for _ in parents:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            break
        found |= more
    return found - {pid}


def all_gone(pids: set[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_eight_conversations_share_blocks_and_leave_nothing_behind(spawn) -> None:
    # Long answers: short ones are done before the last conversation has come in.
    process = spawn("demo", "--json", "--max-tokens", "400", *DUMMY)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert (report["conversations"], report["answers"]) == (8, 16)
    assert report["peak_running"] == 8, "they ran at once"
    assert report["peak_blocks_shared"] >= 1, "the system prompt's blocks were shared"
    assert report["peak_blocks_used"] > 8
    assert 0 < report["prefix_hits"] < report["prefix_queries"]
    assert report["prefix_hits"] == sum(row["cached_tokens"] for row in report["requests"])
    assert report["prefix_queries"] == report["prompt_tokens"]
    for row in report["requests"]:
        assert row["finish_reason"] in ("stop", "length")
        assert 1 <= row["generated_tokens"] <= 400
        if row["turn"] == 2:
            assert row["cached_tokens"] > 0


def test_a_pool_too_small_preempts_and_everyone_is_still_answered(spawn) -> None:
    words = ("--num-gpu-blocks-override", "33", "--max-model-len", "512", "--max-tokens", "160")
    process = spawn("demo", "--json", *words, *DUMMY)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert report["num_blocks"] == 32
    assert report["preemptions"] > 0
    assert all(row["generated_tokens"] > 0 for row in report["requests"])


def test_the_built_in_model_in_words(spawn) -> None:
    process = spawn("demo", "--conversations", "2", "--max-tokens", "24")
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert "conversation 1" in out
    assert "conversation 2" in out
    assert "prefix cache" in out
    assert "\x1b" not in out


def test_a_server_that_cannot_start_is_told_with_its_reason(spawn) -> None:
    process = spawn("demo", "--model", "/no/such/model")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "/no/such/model" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [["--conversations", "0"], ["--max-tokens", "-1"], ["--block-size", "3"], ["--port", "1"]],
)
def test_mistakes_start_nothing(spawn, words: list[str]) -> None:
    process = spawn("demo", *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert out == ""


def test_ctrl_c_takes_the_server_down_too(spawn) -> None:
    process = spawn("demo", "--max-tokens", "1000", *DUMMY)
    assert process.stdout is not None
    while "at once" not in (line := process.stdout.readline()):
        assert line, "the demo left before its conversations began"
    time.sleep(0.3)
    servers = children_of(process.pid)
    assert servers
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == ""
    assert all_gone(servers, 10)


def test_serve_leaves_with_0_on_sigterm_and_its_processes_with_it(spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = spawn("serve", "--host", "127.0.0.1", "--port", str(port))
    assert process.stderr is not None
    while "ready" not in (line := process.stderr.readline()):
        assert line, "the server left before it was ready"
    children = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert all_gone(children, 10)


def test_a_port_in_use_is_one_line(spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = spawn("serve", "--host", "127.0.0.1", "--port", str(port))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"port {port}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["/no/such/model"], "neither a directory here nor a hub id"),
        (["--max-model-len", "99999999"], "max_model_len 99999999 exceeds"),
        (["--num-gpu-blocks-override", "2"], "--max-model-len 16"),
        (["--chat-template", "/no/such.jinja"], "'/no/such.jinja' is neither"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_line(spawn, words: list[str], reason: str) -> None:
    """And not one below `listening on` and a warning about who may connect."""
    process = spawn("serve", "--port", "0", *words)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert reason in err
    assert err.count("\n") == 1
