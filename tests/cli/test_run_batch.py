"""`quire run-batch`: its files, and a run on the built-in model."""

from __future__ import annotations

import json
import resource
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from msgspec import Raw

from quire.cli.main import main
from quire.cli.run_batch import BatchFiles, OutputError
from quire.errors import ConfigError
from quire.server.batch import Reply, Result


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "in").write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    return {"input_file": str(tmp_path / "in"), "output_file": str(tmp_path / "out")}


def answered(custom_id: str) -> Result:
    return Result(f"batch_req_{custom_id}", custom_id, Reply(200, "r", Raw(b"{}")))


def test_answers_are_appended_and_known_the_next_time(paths: dict[str, str]) -> None:
    with ExitStack() as stack:
        files = BatchFiles.open(stack, errors=None, **paths)
        assert files.done == set()
        assert files.count() == 3
        assert len(list(files.lines(1000))) == 4
        files.write(answered("1"))
        files.write(Result("batch_req_2", "1", error={"code": 400, "param": None}))
        assert files.summary() == f"1 answered, 1 failed (see {paths['output_file']})"
    with ExitStack() as stack:
        files = BatchFiles.open(stack, errors=None, **paths)
        assert files.done == {"1", "batch_req_2"}
        files.write(answered("3"))
        assert files.summary() == "1 answered, 0 failed, 2 were done before"
    assert len(Path(paths["output_file"]).read_text().splitlines()) == 3


@pytest.mark.parametrize("rest", ['{"id": "batch_req_2", "cust', '{"id": "batch_req_2"}'])
def test_a_last_line_in_part_is_taken_off(paths: dict[str, str], rest: str) -> None:
    output = Path(paths["output_file"])
    with ExitStack() as stack:
        BatchFiles.open(stack, errors=None, **paths).write(answered("1"))
    whole = output.read_text()
    output.write_text(whole + rest)
    with ExitStack() as stack:
        files = BatchFiles.open(stack, errors=None, **paths)
        assert files.done == {"1"}
        assert output.read_text() == whole
        files.write(answered("2"))
    assert len(output.read_text().splitlines()) == 2


def test_failures_go_where_they_are_wanted_and_are_tried_again(
    paths: dict[str, str], tmp_path: Path
) -> None:
    errors = tmp_path / "errors"
    for _ in range(2):
        with ExitStack() as stack:
            files = BatchFiles.open(stack, errors=str(errors), **paths)
            assert files.done == set()
            files.write(Result("batch_req_1", "1", error={"message": "no"}))
    assert len(errors.read_text().splitlines()) == 1
    assert Path(paths["output_file"]).read_text() == ""


def test_a_line_far_too_long_is_cut_and_the_next_is_whole(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"x" * 200_000 + b"\nnext\n" + b"y" * 200_000)
    with ExitStack() as stack:
        files = BatchFiles.open(
            stack, input_file=str(source), output_file=str(tmp_path / "out"), errors=None
        )
        first, second, third = files.lines(10)
    assert len(first) == 2**16 + 10 == len(third)
    assert second == b"next\n"


def test_files_that_cannot_be_used_are_told_before_a_model_is_loaded(
    paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, words in (
        ({"input_file": "https://host/in"}, "Download it first"),
        ({"input_file": str(tmp_path / "none")}, "No such file"),
        ({"output_file": str(tmp_path / "none" / "out")}, "No such file"),
        ({"output_file": paths["input_file"]}, "different files"),
    ):
        with ExitStack() as stack, pytest.raises(ConfigError, match=words):
            BatchFiles.open(stack, errors=None, **{**paths, **options})
    Path(paths["output_file"]).write_text("somebody's letters\n")
    assert main(["run-batch", "-i", paths["input_file"], "-o", paths["output_file"]]) == 2
    assert "line 1 is no output of run-batch" in capsys.readouterr().err
    assert Path(paths["output_file"]).read_text() == "somebody's letters\n"


def test_the_built_in_model_answers_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompt = {"prompt": "os.path", "max_tokens": 4, "temperature": 0}
    bodies = [prompt] * 5 + [{"prompt": "os.path", "max_tokens": -1}]
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    words = ["run-batch", "-i", str(source), "-o", str(output), "--concurrency", "2"]
    words += ["--served-model-name", "mine", "--max-num-seqs", "4"]
    assert main(words) == 1, "one request failed"
    assert "5 answered, 1 failed" in capsys.readouterr().err
    results = [json.loads(entry) for entry in output.read_text().splitlines()]
    assert {result["custom_id"] for result in results} == {f"r{n}" for n in range(6)}
    texts = {
        (body["model"], body["choices"][0]["text"])
        for body in (result["response"]["body"] for result in results if not result["error"])
    }
    assert len(texts) == 1 and next(iter(texts))[0] == "mine"
    assert main(words) == 0, "all is done"
    assert "0 answered, 0 failed, 6 were done before" in capsys.readouterr().err


def test_vllms_flags_are_known_here_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run-batch", "-i", str(tmp_path / "none"), "-o", str(tmp_path / "out")]
    assert main([*words, "-asc", "1", "-asc", "2"]) == 2
    assert "one process" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_one_line_and_the_next_run_goes_on(
    paths: dict[str, str],
) -> None:
    """The limit on a file's size stands in for a full disk: both fail in the middle of a line."""
    with ExitStack() as stack:
        files = BatchFiles.open(stack, errors=None, **paths)
        files.write(answered("1"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = Path(paths["output_file"]).stat().st_size
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            for name in ("2", "3"):
                with pytest.raises(OutputError, match=r"out cannot be written: .*goes on"):
                    files.write(answered(name))
            files.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert files.summary() == "1 answered, 0 failed"
    with ExitStack() as stack:
        files = BatchFiles.open(stack, errors=None, **paths)
        assert files.done == {"1"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_told_once_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.write_text("no request\nnor this\n")
    words = ["run-batch", "-i", str(source), "-o", str(tmp_path / "out"), "--errors", "/dev/full"]
    assert main(words) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-2:] == [
        "quire run-batch: 0 answered, 0 failed",
        "quire: error: /dev/full cannot be written: No space left on device. What it holds is kept; "
        "the same command goes on where it stopped.",
    ]
