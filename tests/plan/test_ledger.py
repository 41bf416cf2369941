"""What `quire plan` says of memory is what `quire serve --dry-run` says, for the command that plan prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from quire.cli import plan, serve
from quire.config.engine import LARGE_GPU
from quire.errors import MemoryFitError

CASES = [
    "llama-3.1-8b --gpu h100",
    "llama-3.1-8b --gpu l40s -q awq --kv-cache-dtype fp8",
    "llama-3.1-70b --gpu h100:2 -q fp8",
    "llama-3.1-70b --gpu a100:4 -q gptq --max-num-seqs 256 --max-num-batched-tokens 4096",
    "llama-3.1-405b --gpu h200:8 -q fp8_per_channel",
    "qwen2.5-0.5b --gpu rtx4090 -q int8 --block-size 32",
    "qwen3-32b --gpu b200:2 --gpu-memory-utilization 0.8",
    "gemma-3-27b --gpu h100 -q int4",
    "mistral-nemo-12b --gpu mi300x:1 --dtype float16",
]


@pytest.mark.parametrize("words", CASES)
def test_the_memory_is_that_of_a_dry_run(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.run([*words.split(), "--context", "8K", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    by_name = {figure["name"]: figure for figure in planned["memory"]}
    assert serve.run(["--dry-run", *planned["dry_run"]]) == 0
    printed = capsys.readouterr().out

    def shown(name: str) -> str:
        return re.search(rf"^{re.escape(name)} +(.*?)(  |$)", printed, re.M)[1]  # type: ignore[index]

    assert plan.run([*words.split(), "--context", "8K"]) == 0
    text = capsys.readouterr().out
    for name in ("weights", "activations (largest step)", "KV of one token"):
        assert re.search(rf"^{re.escape(name)} +{re.escape(shown(name))}$", text, re.M), name
    assert planned["memory"][0]["value"] / 2**30 == pytest.approx(
        float(re.search(r"([\d.]+) GiB of memory on each GPU", printed)[1]),
        abs=0.006,  # type: ignore[index]
    )
    blocks = int(re.search(r"KV cache: ([\d,]+) blocks", printed)[1].replace(",", ""))  # type: ignore[index]
    each = by_name["sequences of 8,192"]["formula"].split(" / ")[1].split(" ")[0].replace(",", "")
    given = dict(zip(words.split()[1::2], words.split()[2::2], strict=True))
    default = 512 if planned["memory"][0]["value"] >= LARGE_GPU else 256
    seats = int(given.get("--max-num-seqs", default))
    assert min(by_name["KV blocks"]["value"], seats * int(each)) == blocks
    assert shlex.join(planned["dry_run"]) in text


def test_what_does_not_fit_is_the_error_of_a_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MemoryFitError) as planned:
        plan.run(["llama-3.1-70b", "--gpu", "h200:1", "--context", "8K", "-q", "none"])
    assert "Memory of each GPU" not in capsys.readouterr().out
    words = ["--hf-config", "llama-3.1-70b", "--max-model-len", "8K", "--device-memory"]
    with pytest.raises(MemoryFitError) as started:
        serve.run(["--dry-run", *words, str(143771 << 20)])
    assert str(planned.value) == str(started.value)


def test_a_directory_and_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quire.builtin import MODEL_DIR
    from quire.models.known import known_config

    file = tmp_path / "config.json"
    file.write_text(json.dumps(known_config("qwen3-8b")))
    for words in ([str(file)], [str(tmp_path)], ["qwen3-8b"], [str(MODEL_DIR)]):
        assert (
            plan.run([*words, "--gpu", "h100", "--context", "1000", "--input", "500", "--json"])
            == 0
        )
    lines = capsys.readouterr().out.split("\n}\n")
    memory = [json.loads(each + "}")["memory"] for each in lines if each.strip()]
    assert memory[0] == memory[1] == memory[2] != memory[3]
