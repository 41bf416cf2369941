"""SERVING.md: its commands run, its sums are the ledger's, its tables and picture those of the results."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from bench import levers, levers_plot

from quire.cli import serve
from quire.config import from_flat
from quire.config.foreign import foreign_flags
from quire.engine.assemble import estimate_ranks, plan
from quire.engine.dry_run import ConfigOnly
from quire.engine.setup import resolve
from quire.kv_layout import most_held
from quire.models.known import known_config
from quire.runner.footprint import DeviceMemory
from tests.test_readme import LOCAL_SERVER

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SERVING.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
SHELL = [line for kind, text in FENCES if kind == "sh" for line in text.splitlines()]
NOT_RUN = re.compile(r"# not run: \w.+")
COMMANDS = [line for line in SHELL if not NOT_RUN.search(line)]
GIB = 2**30


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


SERVED = [line for line in COMMANDS if line.startswith("quire serve ")]
OTHERS = [line for line in COMMANDS if not line.startswith("quire serve ")]


def asked(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """`quire serve` with these words and --dry-run."""
    assert serve.run([*words, *(() if "--dry-run" in words else ("--dry-run",))]) == 0
    return capsys.readouterr().out


# --- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", SERVED)
def test_a_server_would_start(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in words_of(line)[2:] if word != "MODEL"]
    assert "KV cache: " in asked(capsys, words)


@pytest.mark.parametrize("line", OTHERS)
def test_a_command_runs(line: str, demo_server: object) -> None:
    """Beside a server, whose address is put in place of the page's."""
    url = demo_server.url  # type: ignore[attr-defined]
    words = words_of(LOCAL_SERVER.sub(url, line))
    if words[0] == "quire":
        words = [sys.executable, "-m", *words, "--base-url", url]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr


def test_what_is_not_run_says_why() -> None:
    assert SERVED and OTHERS and len(COMMANDS) + 1 == len(SHELL)


def test_every_option_that_is_named_exists() -> None:
    known = set(re.findall(r"`(--[\w-]+)`", (ROOT / "docs" / "options.md").read_text()))
    known |= {info.flag for info in foreign_flags()} | {"--dry-run", "--config", "--hf-config"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", PAGE))
    bench = (ROOT / "docs" / "bench-options.md").read_text()
    assert {flag for flag in named - known if f"`{flag}`" not in bench} <= {
        "--device-memory", "--model"
    }  # fmt: skip


def test_every_metric_that_is_named_exists() -> None:
    metrics = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"\b((?:vllm|quire):\w+)", PAGE))
    assert len(named) > 15
    assert [
        name for name in named if f"`{name}`" not in metrics and f"`{name}_total`" not in metrics
    ] == []


# --- sizes -----------------------------------------------------------------------------------------


DRY = [(text, out) for (kind, text), (_, out) in itertools.pairwise(FENCES)
       if kind == "sh" and "--device-memory" in text]  # fmt: skip


@pytest.mark.parametrize(("line", "output"), DRY, ids=lambda text: text.splitlines()[0][12:60])
def test_the_page_shows_what_is_printed(
    line: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(capsys, words_of(line)[2:]) == output


def kv_bytes(name: str, size: int) -> int:
    """2 x layers x KV heads x head size x bytes."""
    fields = known_config(name)
    heads = fields["num_attention_heads"]
    head = fields.get("head_dim") or fields["hidden_size"] // heads  # type: ignore[operator]
    return 2 * fields["num_hidden_layers"] * fields["num_key_value_heads"] * head * size  # type: ignore[operator,return-value]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b"])
def test_the_formula_is_the_ledgers(name: str, kv_dtype: str, ranks: int) -> None:
    """Blocks by hand: 0.9 of a device without weights and activations, divided by a block's bytes."""
    options = {"tensor_parallel_size": ranks, "kv_cache_dtype": kv_dtype, "max_model_len": 4096}
    config = from_flat({"model": name, "load_format": "dummy", "device": "cpu", **options})
    resolved = resolve(config, ConfigOnly(known_config(name)))
    memory = DeviceMemory(total=160 * GIB, available=160 * GIB)
    resolved = dataclasses.replace(resolved, device="cuda")
    footprint = estimate_ranks(config, resolved, memory)
    each = (footprint.ranks or (footprint,))[0]
    token = kv_bytes(name, 1 if kv_dtype == "fp8" else 2) // ranks
    room = int(0.9 * 160 * GIB) - each.weight_bytes - each.step_bytes
    blocks = min(room // (16 * token), config.scheduler.max_num_seqs * 256 + 1)
    assert plan(config, resolved, footprint, 4096).num_blocks == blocks


def test_the_tables_of_requests_are_the_tokens_divided(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--hf-config", "llama-3.1-8b", "--device-memory", "80G"]
    rows = re.findall(r"^\| ([\d,]+)(?: tokens)? \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.M)
    assert [row[0] for row in rows] == ["2,048", "8,192", "32,768", "131,072"]
    settings = [[], ["--kv-cache-dtype", "fp8"], ["--quantization", "int8"]]
    for column, more in enumerate(settings, start=1):
        out = asked(capsys, words + more)
        held = int(re.search(r"holds ([\d,]+) tokens", out)[1].replace(",", ""))  # type: ignore[index]
        for row in rows:
            assert int(row[column]) == held // int(row[0].replace(",", ""))


def test_a_window_by_hand() -> None:
    """Gemma 3 27B: 10 of 62 layers keep all, the others 1,024 tokens; a budget of 2,048."""
    spec = resolve(
        from_flat({"model": "gemma-3-27b", "load_format": "dummy", "device": "cpu"}),
        ConfigOnly(known_config("gemma-3-27b")),
    ).spec
    assert spec.kv.windows == (None, *[1024] * 6) and spec.kv.layers_per_page == 10
    assert most_held(1024, 16, 2048) == (1024 + 2048 - 3) // 16 + 2 == 193
    blocks = spec.kv.blocks_for(131072, 16, max_row_tokens=2048)
    assert blocks == 8192 + 6 * 193 == 9350 and f"{blocks:,} in all" in PAGE
    page = spec.kv.page_bytes(16, 2)
    assert page == 2 * 10 * 16 * 128 * 2 * 16 == 1.25 * 2**20
    assert f"{blocks * page / GIB:.1f} GiB, where full attention" in PAGE
    assert kv_bytes("gemma-3-27b", 2) * 131072 == 62 * GIB


def test_the_examples_of_the_formula() -> None:
    for name, text in (("llama-3.1-8b", "131,072"), ("llama-3.1-70b", "327,680")):
        assert f"{kv_bytes(name, 2):,}" == text and text in PAGE
    assert f"61 x (512 + 64) x 2 = {61 * (512 + 64) * 2:,}" in PAGE


# --- measured --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> levers_plot.Results:
    return json.loads(levers.RESULT.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_the_tables_are_those_of_the_results(results: levers_plot.Results) -> None:
    assert levers_plot.with_tables(PAGE, results) == PAGE, "run python -m bench.levers_plot"
    assert PAGE.count("<!-- levers: ") >= len(results)


@pytest.mark.parametrize("scheme", levers_plot.COLORS)
def test_the_picture_is_that_of_the_results(results: levers_plot.Results, scheme: str) -> None:
    made = levers_plot.picture(results, levers_plot.COLORS[scheme])
    path = levers_plot.IMAGES / f"levers-{scheme}.svg"
    assert path.read_text(encoding="utf-8") == made, "run python -m bench.levers_plot"


def test_the_results_are_of_these_settings(results: levers_plot.Results) -> None:
    known = {lever.name: list(lever.settings) for lever in levers.LEVERS}
    for name, lever in results.items():
        assert [each["name"] for each in lever["settings"]] == known[name]
    for lever in results.values():
        assert lever["record"]["commit"] and lever["record"]["machine"]["cpu"]
        assert {len(each["rounds"]) for each in lever["settings"]} in ({1}, {2}, {3})
        first = lever["settings"][0]["rounds"]
        for setting in lever["settings"]:
            found = levers.summary(setting["rounds"], first)
            assert found == {key: setting[key] for key in ("medians", "ratios")}


@pytest.mark.parametrize("lever", levers.LEVERS, ids=lambda lever: lever.name)
def test_a_server_takes_every_setting(lever: levers.Lever) -> None:
    for flags in lever.settings.values():
        serve.configs([*lever.common, *flags])


def test_better_is_to_the_right() -> None:
    setting = {"ratios": {"ttft_ms": 0.5, "output_tok_s": 0.5}}
    less, more = levers_plot.DRAWN[0], levers_plot.DRAWN[2]
    assert levers_plot.better(setting, less) == 2 and levers_plot.better(setting, more) == 0.5


def test_ratios_are_of_the_same_round() -> None:
    slow, fast = {"ttft_ms": 200.0, "cached": 0.0}, {"ttft_ms": 100.0, "cached": 0.5}
    found = levers.summary([slow, fast, fast], [fast, slow, fast])
    assert found["ratios"] == {"ttft_ms": 1.0} and found["medians"]["cached"] == 0.5
