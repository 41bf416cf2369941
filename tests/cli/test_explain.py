"""`quire explain` and `quire timeline`, of files and of servers."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.scheduler.observed import Observed
from tests.scheduler.trace_rules import check_trace

from quire.cli.main import main


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[str]:
    """Of two replicas."""
    folder, names = tmp_path_factory.mktemp("records"), []
    for number in (0, 1):
        engine = Observed(num_blocks=9, budget=64, longest=32)
        for request_id in (1, 2, 3):
            engine.add(2 * request_id + number, 15, 8)
        engine.drain()
        names.append(str(folder / f"{number}.record"))
        Path(names[-1]).write_bytes(engine.record.dump())
    return names


class Server:
    """Answers every path with the same JSON."""

    def __init__(self, answer: object, status: int = 200) -> None:
        self.asked: list[tuple[str, str | None]] = []
        asked, body = self.asked, json.dumps(answer).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers.get("authorization")))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_one_request_of_a_file(records, capsys):
    assert main(["explain", *records, "--request", "r4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("r4 arrived at ") and "preempted" in "".join(lines)
    assert main(["explain", records[1], "--request", "5", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["requests"]
    assert entry["id"] == "r5" and entry["facts"]["num_prompt_tokens"] == 15
    assert entry["facts"]["preemptions"][0]["by"] == 3


def test_without_a_request_what_was_slow(records, capsys):
    assert main(["explain", *records]) == 0
    out = capsys.readouterr().out
    assert out.count(" arrived at ") == 5
    assert ": no free blocks" in out and " in replica 1: " in out


def test_a_replay(records, capsys):
    assert main(["explain", *records, "--replay"]) == 0
    assert capsys.readouterr().out.count("decides the same in every step") == 2
    assert main(["explain", "--url", "http://localhost:1", "--replay"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--request", "r99"], "has nothing of r99"),
        (["--request", "mine"], "must be like r17 or 17"),
        (["--url", "http://localhost:1"], "one of them"),
    ],
)
def test_mistakes(records, capsys, words, message):
    assert main(["explain", records[0], *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_files_that_are_no_records(tmp_path, capsys):
    assert main(["explain"]) == 2
    assert main(["explain", str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "text").write_text("text")
    assert main(["timeline", str(tmp_path / "text")]) == 2
    assert "not a record" in capsys.readouterr().err


def test_of_a_server(capsys, monkeypatch, tmp_path):
    answer = {"requests": [{"id": "r1", "explanation": ["It was fast."], "facts": {}}]}
    with Server(answer) as server:
        words = ["explain", "--url", server.url + "/", "--admin-key", "adm", "--request", "mine/1"]
        assert main(words) == 0
        assert capsys.readouterr().out == "It was fast.\n"
        monkeypatch.setenv("QUIRE_ADMIN_API_KEY", "other")
        assert main(["explain", "--url", server.url]) == 0
        assert server.asked == [
            ("/debug/requests/mine%2F1", "Bearer adm"), ("/debug/requests", "Bearer other"),
        ]  # fmt: skip
    with Server({"error": {"message": "nothing of r1"}}, 404) as server:
        assert main(["explain", "--url", server.url, "--request", "r1"]) == 1
        assert "nothing of r1" in capsys.readouterr().err
    with Server({"traceEvents": []}) as server:
        path = str(tmp_path / "t.json")
        assert main(["timeline", "--url", server.url, "--seconds", "5", "-o", path]) == 0
        assert server.asked == [("/debug/timeline?seconds=5.0", "Bearer other")]


def test_a_timeline_and_its_picture(records, tmp_path, capsys):
    path, picture = tmp_path / "trace.json", tmp_path / "p.svg"
    assert main(["timeline", *records, "-o", str(path)]) == 0
    assert "open it at https://ui.perfetto.dev" in capsys.readouterr().out
    trace = json.loads(path.read_text())
    check_trace(trace)
    assert main(["timeline", records[0], "--picture", str(picture), "--request", "4"]) == 0
    root = ET.fromstring(picture.read_text())
    titles = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("r4: preempted ") for title in titles)
    boxes = [each.attrib for each in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert all(float(box["width"]) > 0 for box in boxes)
    assert main(["timeline", records[0], "--picture", str(picture)]) == 0
    assert main(["timeline", records[0], "--picture", str(picture), "--request", "77"]) == 2
    assert main(["timeline", records[0], "--seconds", "-1"]) == 2


@pytest.mark.parametrize("flags", [["-o"], ["--picture"]])
def test_an_output_that_cannot_be_written_is_one_line(
    records: list[str], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (tmp_path, tmp_path / "none" / "trace.json"):
        assert main(["timeline", records[0], *flags, str(wrong)]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(f"quire: error: cannot open {wrong}: ")
        assert shown.err.count("\n") == 1 and not shown.out
