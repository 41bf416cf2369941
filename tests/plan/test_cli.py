"""`quire plan`: what it prints, its errors, that it imports no torch, and that pages show what it prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import quire
from quire.cli import plan
from quire.cli.main import main
from quire.errors import CheckpointError, ConfigError, UnsupportedModelError
from quire.plan.fitted import FittedCost
from quire.plan.model import find_model
from quire.plan.roofline import Experts
from quire.scheduler.cost_model import Work

ROOT = Path(__file__).parents[2]


def asked(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert plan.run(shlex.split(line)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("page", ["docs/plan.md", "README.md"])
def test_pages_show_what_is_printed(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(
        r"^```sh\nquire plan ([^\n]*)\n```\n\n```text\n(.*?)^```$", text, re.M | re.S
    )
    assert shown
    for line, lines in shown:
        printed = iter(asked(capsys, line).splitlines())
        for each in lines.splitlines():
            assert each == "..." or each in printed, (
                f"{each!r} is not printed, or not in this order"
            )


def test_the_picture_of_the_page_is_of_today(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    line = re.search(r"^quire plan (.* --picture docs/images/plan\.svg)$", text, re.M)
    assert line is not None
    file = tmp_path / "plan.svg"
    asked(capsys, line[1].replace("docs/images/plan.svg", str(file)))
    drawn = file.read_text(encoding="utf-8")
    assert drawn == (ROOT / "docs" / "images" / "plan.svg").read_text(encoding="utf-8")
    tree = ET.fromstring(drawn)
    assert len(tree.findall(".//{*}polyline")) == 2 * 5
    _, _, width, height = map(float, tree.attrib["viewBox"].split())
    for element in tree.findall(".//{*}polyline"):
        for point in element.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 < x < width
            assert 0 < y < height
    assert "prefers-color-scheme: dark" in drawn


def test_it_imports_no_torch_and_no_network() -> None:
    code = (
        "import sys; from quire.cli import plan\n"
        "plan.run(['llama-3.1-8b', '--gpu', 'h100', '--rate', '1', '--json'])\n"
        "names = {'torch', 'numpy', 'huggingface_hub', 'transformers', 'matplotlib', 'aiohttp'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(quire.__file__).parents[1])},
    )  # fmt: skip


def test_every_figure_has_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    line = "llama-3.1-8b --gpu h100:2 --context 8K --input 5000 --rate 5"
    found = json.loads(asked(capsys, f"{line} --json"))
    figures = [*found["memory"], *found["speed"], *found["cost"]]
    assert all(figure["formula"] for figure in [*figures, *found["batches"]])
    text = asked(capsys, f"{line} --formulas")
    assert all(f"= {figure['formula']}\n" in text for figure in figures)
    for row in found["batches"]:  # max((a GB + b GB) / c GB/s, ...) = t ms for n tokens
        a, b, c = re.match(
            r"max\(\(([\d.]+) GB .* ([\d.]+) GB of KV\) / ([\d,]+) GB/s", row["formula"]
        ).groups()  # type: ignore[union-attr]
        seconds = (float(a) + float(b)) / float(c.replace(",", ""))
        assert row["limit"] == "memory"
        assert seconds == pytest.approx(row["bound_itl_s"], rel=0.01)
        assert row["bound_tokens_per_s"] >= row["likely_tokens_per_s"]
    blended, inputs, outputs, full = (figure["value"] for figure in found["cost"])
    assert 5000 * inputs + 200 * outputs == pytest.approx(5200 * blended)
    assert blended == pytest.approx(2 * 2.95 / 3600 / 5 / 5200 * 1e6)
    assert full < blended


def test_more_than_it_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    text = asked(capsys, "llama-3.1-8b --gpu l40s:1 --rate 500 -q none")
    assert "500.00 requests/s are more than it can serve." in text
    assert "Cost at" not in text


def test_the_report_has_the_budget_of_the_layout_it_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A large GPU's own is 8,192, and a search tries less."""
    planned = json.loads(
        asked(capsys, "llama-3.1-8b --gpu h100 -q none --rate 3 --context 8K --json")
    )
    budget = planned["layouts"][0]["max_num_batched_tokens"]
    words = planned["dry_run"]
    assert words[words.index("--max-num-batched-tokens") + 1] == str(budget)


def test_a_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert "$2.5 an hour ($2.5" in asked(capsys, "qwen3-8b --gpu h100 --price 2.5")
    assert "TFLOP/s in bf16, $9 an hour\n" in asked(capsys, "qwen3-8b --gpu h100 --price 9")


def test_what_was_measured_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = FittedCost(
        (1, 512, 2048), (0.01, 0.02, 0.06), row=1e-5, context=1e-8, request_seconds=0.004,
        errors={"all": 0.031}, about={"model": "m", "device": "cuda", "tensor_parallel_size": 1},
    )  # fmt: skip
    file = tmp_path / "cost.json"
    file.write_text(json.dumps(cost.content()))
    line = f"qwen3-8b --gpu h200:1 --cost {file} --rate 2"
    text = asked(capsys, line)
    assert "predicted by what was measured of m; mean error of steps not fitted 3.1%" in text
    assert "Prediction at rates" in text
    assert "estimate" not in text.lower()
    found = json.loads(asked(capsys, f"{line} --json"))
    assert found["kind"] == "prediction"
    assert found["measured"]["model"] == "m"
    row = found["batches"][0]
    assert row["likely_itl_s"] == pytest.approx(cost.seconds(Work(1, 1100)))
    alone = next(
        figure
        for figure in found["speed"]
        if figure["name"] == "TTFT of a prompt alone, prediction"
    )
    assert alone["value"] == pytest.approx(0.004 + cost.seconds(Work(0, 0, 1, 1000, 500000)))
    for gpu in ("h200", "h200:2"):
        with pytest.raises(ConfigError, match="of one layout, 1 ranks; name it: --gpu GPU:1"):
            plan.run(["qwen3-8b", "--gpu", gpu, "--cost", str(file)])
    file.write_text(json.dumps({**cost.content(), "about": {"device": "cpu"}}))
    with pytest.raises(ConfigError, match="measured on the device 'cpu'"):
        plan.run(["qwen3-8b", "--gpu", "h200:1", "--cost", str(file)])


def test_the_built_in_model_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert "3,935,424 parameters" in asked(capsys, "--gpu l40s --input 500")


def test_a_mixture_of_experts_is_planned_and_not_served(capsys: pytest.CaptureFixture[str]) -> None:
    text = asked(capsys, "Qwen/Qwen3-30B-A3B --gpu h100:2 -q none")
    assert "8 of 128 experts a token" in text
    assert "Quire does not serve mixtures of experts yet" in text
    assert find_model("mixtral-8x7b").experts == Experts(8, 2)


def test_mistakes_are_typed_and_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for line, error, message in (
        ("llama-3.1-8x --gpu h100", ConfigError, "try llama-3.1-8b"),
        ("llama-3.1-8b --gpu h1000", ConfigError, "try h100"),
        ("llama-3.1-8b --gpu h100 --context 1000", ConfigError, "raise --context, or lower --input"),
        ("llama-3.1-8b --gpu h100 --context 900K", ConfigError, "exceeds the 131072 positions"),
        ("qwen3-8b --gpu h100:64", ConfigError, "can be divided among"),
        ("nobody/nothing --gpu h100", CheckpointError, "not in the hub's cache, and the hub"),
        ("./nothing --gpu h100", ConfigError, "neither a directory"),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(message)):
            plan.run(line.split())
    file = tmp_path / "config.json"
    file.write_text('{"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}')
    with pytest.raises(UnsupportedModelError, match="every layer has the same experts"):
        plan.run([str(file)])


@pytest.mark.parametrize(
    "words", ["--rate 0", "--rate x", "--input 0", "--quantization q9", "--gup h100"]
)
def test_wrong_words_are_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        plan.run(["llama-3.1-8b", *words.split()])
    assert exit_code.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--context 0", "--context: must be from 1 to"),
        ("--context 100000000000K", "--context: must be from 1 to"),
        ("--rate abc", "must be from 1e-06 to 1,000,000, got 'abc'"),
        ("--rate 1e-300", "must be from 1e-06 to 1,000,000, got '1e-300'"),
        ("--rate 1e300", "must be from 1e-06 to 1,000,000, got '1e300'"),
        ("--slo ''", "slo ''"),
    ],
)
def test_absurd_values_are_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["plan", "llama-3.1-8b", "--gpu", "h100", *shlex.split(words)])
    except SystemExit as left:
        code = left.code
    shown = capsys.readouterr()
    assert code == 2
    assert not shown.out
    assert shown.err.count("\n") == 1 and said in shown.err
