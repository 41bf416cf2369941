"""KV on a disk outlasts the engine, and nothing that happens to it there changes a token."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.config import from_flat
from quire.engine.assemble import check_local
from quire.errors import ConfigError

pytestmark = pytest.mark.usefixtures("loads_pay")
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=5)
PROMPTS = [[300 + (7 * i + j * j) % 900 for j in range(200)] for i in range(3)]
BLOCKS = {"num_gpu_blocks_override": 20, "max_model_len": 256}
"""Room for one prompt: each drives out the one before it."""


def engine(path: Path | None, **options: Any) -> LLM:
    if path is not None:
        options |= {"kv_disk_path": str(path), "kv_disk_size": 0.1}
        options |= {"kv_write_policy": "write_through"}
    return LLM(None, **BLOCKS, **options)


def answers(llm: LLM) -> tuple[list[Any], int]:
    """Tokens and logprobs, and the number of prompt tokens found."""
    said, cached = [], 0
    for prompt in PROMPTS:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], PARAMS, use_tqdm=False)
        answer = output.outputs[0]
        said.append((answer.token_ids, answer.logprobs))
        cached += output.num_cached_tokens or 0
    return said, cached


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    with engine(None) as llm:
        return answers(llm)[0]


ALL = 3 * (200 // 16) * 16


def test_a_restarted_engine_finds_everything(tmp_path: Path, expected: list[Any]) -> None:
    with engine(tmp_path / "kv") as llm:
        assert answers(llm) == (expected, 0)
        assert answers(llm)[0] == expected
    with engine(tmp_path / "kv") as llm:
        assert answers(llm) == (expected, ALL)
    with engine(tmp_path / "kv", block_size=32) as llm:
        assert answers(llm) == (expected, 0)  # in another directory


def test_the_last_request_before_the_end_is_there_too(tmp_path: Path, expected: list[Any]) -> None:
    for cached in (0, 192):
        with engine(tmp_path / "kv") as llm:
            one = PARAMS.replace(max_tokens=1)
            (output,) = llm.generate([{"prompt_token_ids": PROMPTS[2]}], one, use_tqdm=False)
            assert output.num_cached_tokens == cached


def wait_until_written(path: Path) -> None:
    """Until the files have not grown for two seconds: the store writes behind the answers."""
    until, size, since = time.monotonic() + 60, 0, time.monotonic()
    while size == 0 or time.monotonic() < since + 2:
        assert time.monotonic() < until
        time.sleep(0.05)
        now = sum(file.stat().st_size for file in path.rglob("*.kv"))
        if now != size:
            size, since = now, time.monotonic()


def test_after_kill(tmp_path: Path, expected: list[Any]) -> None:
    llm = engine(tmp_path / "kv", engine="process")
    try:
        assert answers(llm)[0] == expected
        wait_until_written(tmp_path)
        os.kill(llm._core.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    finally:
        llm.close()
    with engine(tmp_path / "kv") as again:
        said, cached = answers(again)
        assert said == expected and cached == ALL


@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
def test_damaged_files_change_nothing(tmp_path: Path, expected: list[Any], damage: str) -> None:
    path = tmp_path / "kv"
    for _ in range(2):
        with engine(path) as llm:
            assert answers(llm)[0] == expected
    with engine(path, swap_space=0.01) as llm:  # and what damages them while they are in use
        files = sorted(path.rglob("*.kv"))
        for file in files:
            data = bytearray(file.read_bytes())
            if damage == "cut":
                os.truncate(file, len(data) // 2)
                continue
            if damage == "swap":
                data = bytearray(files[0].read_bytes()[:64]) + data[64:][::-1]
            for at in range(1000, len(data), 16 << 10):
                data[at] ^= 255
            file.write_bytes(data)
        said, cached = answers(llm)
        assert said == expected and cached < ALL
        assert answers(llm)[0] == expected


def test_a_path_that_cannot_be_used_is_known_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--kv-disk-path .*file is not a directory"):
        check_local(from_flat({"model": "owner/model", "kv_disk_path": str(tmp_path / "file")}))


def test_a_missing_key_is_known_before_the_model_is_loaded(monkeypatch) -> None:
    monkeypatch.delenv("QUIRE_KV_KEY", raising=False)
    exchange = {"kv_connector": "TCPConnector", "kv_role": "kv_producer", "kv_ip": "10.0.0.1"}
    config = from_flat({"model": "owner/model", "kv_transfer_config": exchange})
    with pytest.raises(ConfigError, match="set QUIRE_KV_KEY"):
        check_local(config)
    monkeypatch.setenv("QUIRE_KV_KEY", "x" * 16)
    check_local(config)
