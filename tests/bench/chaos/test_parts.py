"""The parts of `quire chaos` that touch the machine: processes, the clock, the full disk, and its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from random import Random

import pytest

from quire.bench.chaos import processes
from quire.bench.chaos.adapters import NAMES, write_adapters
from quire.bench.chaos.clock import WallClock
from quire.bench.chaos.faults import FAULTS, create_faults
from quire.bench.chaos.faults.disk import fill
from quire.bench.chaos.metrics import read_metrics
from quire.bench.chaos.options import parse_duration
from quire.bench.chaos.server import keys_text, small_disk
from quire.bench.chaos.workload import adapted_calls, fresh_calls, large_calls, small_calls
from quire.builtin import MODEL_DIR
from quire.cli.chaos import run as chaos_command
from quire.errors import ConfigError
from quire.server.keys import Keys


@contextmanager
def child(code: str, **environment: str):
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_processes_are_found_by_their_mark_even_without_their_parent():
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()']); print(flush=True)"
    with child(orphan, **{processes.MARK: "one"}) as parent:
        parent.stdout.readline()
        assert parent.wait() == 0
        (left,) = processes.find("one")
        assert left.pid != parent.pid and left.role == "other"
        assert processes.sample(left.pid).memory > 1 << 20
        assert processes.sample(left.pid).descriptors >= 3
    assert processes.find("another") == []


def test_a_zombie_is_found_and_is_no_process_of_the_run():
    code = "import os; print(os.fork() or os._exit(0), flush=True); input()"
    with child(code, **{processes.MARK: "two"}) as parent:
        pid = int(parent.stdout.readline())
        until(lambda: processes.zombies([parent.pid]) == [pid])
        assert [process.pid for process in processes.find("two")] == [parent.pid]
        assert processes.zombies([os.getpid()]) == []


def until(holds, seconds=30.0):
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds
        time.sleep(0.01)


def test_the_clock_of_a_process_is_moved_while_it_runs(tmp_path):
    clock = WallClock(tmp_path)
    if clock.reason:
        pytest.skip(clock.reason)
    code = "import time\nwhile True: input(); print(time.time(), time.monotonic(), flush=True)"
    with child(code, **clock.environment) as process:

        def times():
            process.stdin.write("\n")
            process.stdin.flush()
            return map(float, process.stdout.readline().split())

        for shift in (0, 86_400, -3600):
            clock.set(shift)
            wall, steady = times()
            assert wall - time.time() == pytest.approx(shift, abs=20)
            assert steady == pytest.approx(time.monotonic(), abs=20)


def test_a_full_disk_is_full(tmp_path):
    with small_disk(tmp_path / "disk") as reason:
        if reason:
            pytest.skip(reason)
        assert fill(tmp_path / "disk" / "filler") > 1 << 20
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "disk" / "other").write_bytes(b"x")
    assert list((tmp_path / "disk").iterdir()) == []


def test_only_root_gets_a_small_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with small_disk(tmp_path / "disk") as reason:
        assert "root" in reason and (tmp_path / "disk").is_dir()


def test_metrics_are_read_by_name_and_label():
    metrics = read_metrics('# TYPE a gauge\na{b="c"} 1.0\na{b="d"} 2.5e+0\nab 0.0\na_total 7\n')
    assert metrics.sum("a") == 3.5
    assert metrics.sum("a", 'b="d"') == 2.5
    assert metrics.nonzero("ab") == [] and len(metrics.nonzero("a")) == 2
    with pytest.raises(KeyError):
        metrics.sum("absent")


def test_the_same_seed_asks_the_same():
    for calls in (small_calls, large_calls, adapted_calls):
        assert calls(3) == calls(3) != calls(4)
        assert len({call.name for call in calls(3)}) == len(calls(3))
    sent = [*small_calls(0), *large_calls(0)]
    assert {call.stream for call in sent} == {True, False}
    assert {json.loads(call.body)["temperature"] == 0 for call in sent} == {True, False}
    assert {call.name for call in fresh_calls(Random(0), 3)} == {"fresh"}


def test_the_keys_are_read_by_the_server():
    keys = Keys()
    keys.use(keys_text([("blue", "spare")]).encode())
    assert {
        keys.find(key.encode()).tenant.name for key in ("key-of-red", "key-of-blue", "spare")
    } == {
        "red",
        "blue",
    }


def test_adapters_need_a_config(tmp_path):
    assert write_adapters(MODEL_DIR, tmp_path / "one", 0) == ""
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(NAMES)
    assert "directory" in write_adapters(tmp_path, tmp_path / "two", 0)


def test_durations():
    assert [parse_duration(text) for text in ("30s", "5m", "1h", "90", "0.5m")] == [
        30,
        300,
        3600,
        90,
        30,
    ]
    for text in ("", "0s", "-5m", "5 minutes", "m"):
        with pytest.raises(ConfigError, match="--duration"):
            parse_duration(text)


def test_mistakes_are_reported_before_anything_starts():
    with pytest.raises(ConfigError, match="no 'earthquake'"):
        chaos_command(["--faults", "kill-core,earthquake"])
    with pytest.raises(ConfigError, match="--duration"):
        chaos_command(["--duration", "soon"])
    assert [fault.name for fault in create_faults(())] == list(FAULTS)
