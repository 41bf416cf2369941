"""`quire simulate`, from flags to figures."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from quire.cli.main import main

H100 = [
    "simulate",
    "--gpu",
    "h100",
    "--model",
    "llama-3.1-8b",
    "--max-model-len",
    "8k",
    "--duration",
    "20s",
]
COST = {
    "quire_cost": 1, "sizes": [1, 64], "curve": [0.01, 0.02], "row": 0.0, "context": 1e-7,
    "prompt_context": 0.0, "prompt_step": 0.001, "request_seconds": 0.005, "token_seconds": 0.0,
}  # fmt: skip


def figures(argv: list[str], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "out.json"
    assert main([*argv, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_gpu_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures([*H100, "--rate", "6", "--slo", "ttft=1s,itl=50ms"], tmp_path)
    assert found["about"]["step_time"] == "estimate"
    assert found["about"]["max_in_flight"] == 2
    assert 60 < found["requests"] < 180
    assert 20 < found["ttft_ms"]["p50"] < found["ttft_ms"]["p99"] < 2000
    assert 5 < found["itl_ms"]["p50"] < 20
    assert 0.9 < found["meet_slo"] <= 1
    assert found["cost"]["per_million_output_tokens"] > 0
    text = capsys.readouterr().out
    assert "TTFT" in text
    assert "an estimate from the data sheet" in text


def test_the_blocks_are_those_of_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures([*H100, "--rate", "1"], tmp_path)
    argv = ["--dry-run", "--hf-config", "llama-3.1-8b", "--device-memory", str(81559 << 20)]
    assert main(["serve", *argv, "--max-model-len", "8k"]) == 0
    assert f"{found['about']['kv_blocks']:,} blocks" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """In another process, too: hashes of texts differ there."""
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    argv = [
        *H100,
        "--trace",
        "mooncake",
        "--rate",
        "3",
        "--replicas",
        "3",
        "--max-model-len",
        "64k",
    ]
    for path, seed in zip(paths, "001", strict=True):
        command = [sys.executable, "-m", "quire", *argv, "--seed", seed, "--json", str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other


def test_torch_is_not_imported() -> None:
    argv = [*H100, "--rate", "2"]
    script = f"import sys; from quire.cli.main import main; main({argv!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)


def test_a_measured_device(tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps(COST))
    argv = [
        "simulate",
        "--cost",
        str(cost),
        "--trace",
        "sharegpt",
        "--rate",
        "2",
        "--duration",
        "20s",
    ]
    found = figures([*argv, "--num-gpu-blocks-override", "400", "--device", "cpu"], tmp_path)
    assert found["about"]["step_time"] == "fitted"
    assert found["about"]["kv_blocks"] == 399
    assert found["about"]["max_in_flight"] == 1
    assert found["queue_ms"]["mean"] >= 5
    assert "cost" not in found


def test_requests_that_come_all_at_once(tmp_path: Path) -> None:
    trace, line = tmp_path / "trace.jsonl", {"arrival": 0, "prompt_tokens": 9, "output_tokens": 20}
    trace.write_text("".join(json.dumps(line) + "\n" for _ in range(3)))
    found = figures([*H100[:5], "--trace", str(trace)], tmp_path)
    assert found["requests"] == 3 and found["output_tokens_per_second"] > 0
    assert found["steady"] == {"offered": 0.0, "served": 0.0, "is_saturated": False}


def test_a_sweep_finds_saturation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "sweep.svg"
    argv = [*H100, "--sweep-rate", "8:32:12", "--plot", str(plot), "--max-num-seqs", "32"]
    found = figures(argv, tmp_path)
    assert [point["rate"] for point in found["points"]] == [8, 20, 32]
    assert 8 < found["saturation_rate"] < 32
    assert found["first_saturated_rate"] in (20, 32)
    assert found["points"][0]["ttft_ms"]["p99"] < found["points"][2]["ttft_ms"]["p99"]
    assert "saturated at" in capsys.readouterr().out
    texts = [each.text for each in ET.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert "TTFT, ms" in texts


def test_a_sample_of_a_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "day.svg"
    argv = [
        *H100, "--rate", "50", "--replicas", "20", "--duration", "1d", "--daily", "0.5", "--warmup", "4s",
        "--sample-replicas", "2", "--sample-windows", "8", "--window", "6s", "--plot", str(plot),
    ]  # fmt: skip
    found = figures(argv, tmp_path)
    assert found["requests_per_second"] == pytest.approx(50, rel=0.15)
    assert found["replicas"] == pytest.approx(20)
    assert found["sample"]["windows"] == 8
    assert 0 < found["sample"]["standard_error"]["ttft_ms.mean"] < 0.5
    assert "Standard errors" in capsys.readouterr().out
    ET.parse(plot)


def test_autoscaling(tmp_path: Path) -> None:
    argv = [
        *H100,
        "--rate",
        "20",
        "--autoscale",
        "1:3",
        "--autoscale-target",
        "8",
        "--start-delay",
        "1s",
    ]
    found = figures(argv, tmp_path)
    assert 1 < found["replicas"] < 3


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "how long does a step take"),
        (["--gpu", "h100"], "name a model"),
        (["--gpu", "h101", "--model", "llama-3.1-8b"], "not in the table"),
        (["--cost", "/none.json"], "cost file"),
        (["--bound", "--cost", "x"], "bound is of a data sheet"),
        (["--gpu", "h100", "--autoscale", "4"], "LEAST:MOST"),
        (["--gpu", "h100", "--sweep-rate", "5:1:1"], "FROM:TO:STEP"),
        (["--gpu", "h100", "--slo", "itl"], "slo must be"),
        (["--gpu", "h100", "--duration", "ten"], "a time such as"),
        (["--gpu", "h100", "--plot", "x.png"], "must end in .svg"),
        (["--gpu", "h100", "--sample-replicas", "2"], "sample_replicas"),
        (["--gpu", "h100", "--model", "llama-3.1-8b", "--trace", "sharegpt"], "give --rate"),
        (["--gpu", "h100", "--model", "llama-3.1-8b", "--trace", "/no/file"], "cannot be read"),
        (["--gpu", "h100", "--model", "llama-3.1-8b", "--pipeline-parallel-size", "2"], "not simulated"),
    ],
)  # fmt: skip
def test_mistakes_are_named(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *argv]) == 2
    assert says in capsys.readouterr().err
