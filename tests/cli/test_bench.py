"""`quire bench` as people run it: against the null server, against ours, and against what fails."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from tests.bench.conftest import in_thread, read_request, rude_server

from quire.bench.agents import interactivity, schedule
from quire.bench.null_server import NullOptions, serve_null
from quire.bench.options import DatasetOptions
from quire.cli.main import main

VLLM_KEYS = (
    "date backend model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration "
    "completed failed total_input_tokens total_output_tokens request_throughput request_goodput "
    "output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests"
).split()
SMALL = ["--num-prompts", "6", "--random-input-len", "12", "--random-output-len", "4"]
BUILTIN = ["--tokenizer", "quire-builtin"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def null_url() -> object:
    with in_thread(lambda ready: serve_null(NullOptions(), on_ready=ready)) as url:
        yield url


def serve(url: str, *words: str) -> int:
    return main(["bench", "serve", "--base-url", url, *SMALL, *BUILTIN, *words])


def test_a_run_against_quire_itself(demo_server: object, tmp_path: Path, capsys: Capture) -> None:
    """The one test with a model: counts, keys, and a detailed result."""
    url = demo_server.url  # type: ignore[attr-defined]
    words = ["--backend", "openai-chat", "--goodput", "e2el:60000", "--temperature", "0"]
    code = main(
        ["bench", "serve", "--base-url", url, *SMALL, *words, "--save-detailed",
         "--result-dir", str(tmp_path), "--metadata", "who=me", "--request-rate", "200"]
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    assert "Serving Benchmark Result" in shown and "P99 TTFT (ms):" in shown
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("openai-chat-200.0qps-quire-builtin-")
    result = json.loads(path.read_text())
    assert set(VLLM_KEYS) <= set(result)
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert {f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p99")} <= set(result)
    assert (result["completed"], result["failed"], result["who"]) == (6, 0, "me")
    assert result["output_tokens_from"] == "usage"
    assert result["output_lens"] == [4] * 6 and result["total_output_tokens"] == 24
    assert all(length > 12 for length in result["input_lens"])  # the chat template adds its own
    assert result["request_goodput"] == result["request_throughput"] > 0
    assert len(result["ttfts"]) == len(result["itls"]) == len(result["generated_texts"]) == 6
    assert result["record"]["command"].startswith("quire") or result["record"]["command"]


AGENTS: dict[str, object] = {
    "agents_sessions": 2, "agents_turns": 3, "agents_system_len": 160, "agents_tool_len": "8-20",
    "agents_output_len": "4-8", "agents_think_time": 0.01, "agents_edit_share": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("words", [[], ["--prompt-token-ids"], ["--backend", "openai"]])
def test_agents_against_quire_itself(demo_server: object, tmp_path: Path, words: list[str]) -> None:
    """Each turn does the work asked for, and finds what it shares with the turn before it in the cache."""
    url = demo_server.url  # type: ignore[attr-defined]
    flags = [text for name, value in AGENTS.items() for text in (f"--{name}", str(value))]
    words += ["--save-detailed", "--result-dir", str(tmp_path), "--seed", str(len(words))]
    assert (
        main(["bench", "serve", "--base-url", url, "--dataset-name", "agents", *flags, *words]) == 0
    )
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    chat = words[0] == "--save-detailed"
    assert result["backend"] == ("openai-chat" if chat else "openai")
    assert (result["completed"], result["failed"], result["sessions"]) == (6, 0, 2)
    shape = DatasetOptions(dataset_name="agents", **AGENTS).agents  # type: ignore[arg-type]
    sessions = schedule(shape, int(words[-1]))
    turns = [(session, turn) for session in sessions for turn in range(3)]
    assert result["output_lens"] == [s.turns[turn].output_len for s, turn in turns]
    if words[0] == "--prompt-token-ids":
        assert result["input_lens"] == [s.prompt_len(turn) for s, turn in turns]
        cached = zip(turns, result["cached_lens"], strict=True)
        assert all(s.shared_len(t) - 15 <= got <= s.shared_len(t) for (s, t), got in cached if t)
    seconds = [
        start + latency - due
        for start, latency, due in zip(
            result["start_times"], result["e2els"], result["due_times"], strict=True
        )
    ]
    turn_times = list(zip(seconds, result["output_lens"], strict=True))
    assert result["interactivity"] == pytest.approx(interactivity(turn_times))


def test_the_result_is_not_detailed_unless_asked(
    null_url: str, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    assert serve(null_url, *words, "--max-concurrency", "2", "--num-warmups", "3") == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["request_rate"] == "inf" and result["max_concurrency"] == 2
    assert "ttfts" not in result
    assert result["model_id"] == "null"  # asked of the server
    assert result["total_output_tokens"] == 24


def test_what_fails_is_counted_and_told(capsys: Capture) -> None:
    async def busy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 429 No\r\nContent-Length: 16\r\n\r\n" + b'{"error":"later"}'[:16])
        await writer.drain()

    with rude_server(busy) as url:
        assert serve(url, "--model", "m") == 1
    shown = capsys.readouterr().out
    assert "Failed requests:                         6" in shown
    assert "failed: 6 x HTTP 429" in shown


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["--model", "m", "--dataset-name", "sharegpt"], "dataset_name sharegpt needs", 2),
        (["--request-rate", "0"], "request_rate must be greater", 2),
        (["--request-rate", "x"], "request_rate must be a number", 2),
        (["--percentile-metrics", "tfft"], "percentile_metrics", 2),
        (["--metric-percentiles", "101"], "metric_percentiles", 2),
        (["--goodput", "ttft=5"], "goodput must be", 2),
        (["--plot", "x.txt"], "plot must end in", 2),
        (["--tokenizer", "/no/such"], "no tokenizer for", 2),
        (["--base-url", "http://127.0.0.1:9"], "cannot connect", 1),
        (["--prompt-token-ids", "--backend", "openai-chat"], "prompt_token_ids needs", 2),
        (["--dataset-name", "agents", "--request-rate", "3"], "agents-think-time", 2),
        (["--agents-tool-len", "9-5"], "agents_tool_len: expected LOW-HIGH", 2),
        (["--agents-edit-share", "2"], "agents_edit_share", 2),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], says: str, code: int, null_url: str, capsys: Capture
) -> None:
    assert serve(null_url, *words) == code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_an_unknown_flag_is_an_error(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", "--request-rat", "3"])
    assert caught.value.code == 2
    assert "Did you mean --request-rate?" in capsys.readouterr().err


def test_unknown_benchmarks_and_none(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serv"])
    assert caught.value.code == 2
    assert "Did you mean serve?" in capsys.readouterr().err
    assert main(["bench"]) == 2
    assert "null-server" in capsys.readouterr().out


def test_help_of_every_benchmark(capsys: Capture) -> None:
    from quire.cli.bench import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main(["bench", name, "--help"])
        assert caught.value.code == 0
        assert f"quire bench {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    import os
    import subprocess

    import quire

    code = (
        "import sys\nfrom quire.cli.main import main\n"
        "try: main(['bench', 'serve', '--help'])\nexcept SystemExit: pass\n"
        "print('\\n', *{n.split('.')[0] for n in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(quire.__file__).parents[1])},
    )  # fmt: skip
    heavy = {"torch", "numpy", "msgspec", "httptools", "tokenizers", "matplotlib", "uvloop"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())


def test_a_trace_and_its_picture(null_url: str, tmp_path: Path, capsys: Capture) -> None:
    trace = tmp_path / "t.jsonl"
    entry = {"input_length": 8, "output_length": 3, "hash_ids": [1]}
    trace.write_text("\n".join(json.dumps({"timestamp": at, **entry}) for at in (0, 20, 40)))
    words = ["--dataset-name", "timed_trace", "--dataset-path", str(trace), "--plot"]
    code = serve(null_url, *words, str(tmp_path / "p.png"), "--timed-trace-sec-multiplier", "0.001")
    assert code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "Successful requests:                     3" in capsys.readouterr().out


def test_a_picture_needs_matplotlib(
    null_url: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert serve(null_url, "--plot", "p.png") == 2
    assert 'pip install "quire[bench]"' in capsys.readouterr().err


def test_a_sweep(null_url: str, tmp_path: Path, capsys: Capture) -> None:
    out, picture = tmp_path / "s.json", tmp_path / "s.svg"
    code = main(
        ["bench", "sweep", "--base-url", null_url, *SMALL, *BUILTIN, "--concurrencies", "1", "3",
         "--output-json", str(out), "--plot", str(picture)]
    )  # fmt: skip
    assert code == 0
    content = json.loads(out.read_text())
    assert [point["load"] for point in content["points"]] == ["1", "3"]
    assert all(point["completed"] == 6 for point in content["points"])
    assert "<svg" in picture.read_text()
    assert main(["bench", "sweep", "--rates", "0", "--base-url", null_url]) == 2


def test_sessions_are_for_serve_alone(null_url: str, capsys: Capture) -> None:
    words = ["--dataset-name", "agents", "--base-url", null_url, *BUILTIN]
    assert main(["bench", "sweep", "--rates", "1", *words]) == 2
    assert "only `quire bench serve` can send" in capsys.readouterr().err


def test_a_sharegpt_file_from_the_stand_in(null_url: str, tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "s.json")
    assert main(["bench", "dataset", path, "--num-prompts", "5"]) == 0
    assert serve(null_url, "--dataset-name", "sharegpt", "--dataset-path", path) == 0
    assert "Successful requests:                     6" in capsys.readouterr().out


def test_offline_benchmarks(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "o.json"
    assert main(["bench", "throughput", *SMALL, "--output-json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["total_prompt_tokens"], result["total_output_tokens"]) == (72, 24)
    assert "output tokens/s" in capsys.readouterr().out
    words = [
        "--batch-size",
        "2",
        "--output-len",
        "3",
        "--num-iters",
        "2",
        "--num-iters-warmup",
        "1",
    ]
    assert main(["bench", "latency", *words, "--output-json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert len(result["latencies"]) == 2 and set(result["percentiles"]) >= {"50", "99"}


def test_speculation_beside_none(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "t.json"
    words = ["bench", "throughput", *SMALL, "--output-json", str(out), "--disable-tqdm"]
    assert main([*words, "--spec-method", "ngram", "--compare-speculation", "2"]) == 0
    result = json.loads(out.read_text())
    plain = result["without_speculation"]
    assert plain["total_output_tokens"] == result["total_output_tokens"] == 24
    assert len(result["speculation_ratios"]) == 2
    shown = capsys.readouterr().out
    assert "Without speculation: " in shown and "With speculation / without: " in shown
    assert main([*words, "--compare-speculation", "2"]) == 2
    assert "--spec-method" in capsys.readouterr().err


def test_kernels(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "k.json"
    small = "--hidden 64 --ffn 64 --q-heads 2 --kv-heads 1 --head-dim 32 --vocab 100 --context 40"
    words = [*small.split(), "--rows", "1", "3", "--repeats", "1", "--cpu-threads", "1"]
    assert main(["bench", "kernels", *words, "--output-json", str(out)]) == 0
    rows = json.loads(out.read_text())["kernels"]
    names = {row["kernel"].split()[0] for row in rows}
    assert {"linear", "paged_attention", "rope_write_kv", "sample"} <= names
    assert all(row["us"] > 0 and row["reference_us"] > 0 for row in rows)


def test_the_clients_own_limits(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "c.json"
    words = ["--requests", "64", "--concurrency", "8", "--rate", "40", "--seconds", "0.1"]
    assert main(["bench", "client", *words, "--output-json", str(out)]) == 0
    short, long, pace = json.loads(out.read_text())["checks"]
    assert (short["requests"], long["requests"], pace["requests"]) == (64, 4, 4)
    assert pace["failed"] == 0 and pace["p99_itl_error_ms"] >= 0


def test_startup(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine and the server truly start; that Python can import torch is taken on trust."""
    commands = {"python": 0.1, "import_quire": 0.1, "help": 0.1, "import_torch": 1.0}
    monkeypatch.setattr("quire.bench.startup._commands", lambda environment: commands)
    out = tmp_path / "u.json"
    assert main(["bench", "startup", "--runs", "1", "--output-json", str(out)]) == 0
    middle = json.loads(out.read_text())["medians"]
    assert 0 < middle["engine_load"] < middle["engine_process"]
    assert 0 < middle["server_ready"] < middle["server_first_token"]
