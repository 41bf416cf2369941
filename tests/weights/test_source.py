"""A place that models come from, added in one file, this one: a whole model as one file of torch.save."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from quire import LLM, SamplingParams
from quire.errors import CheckpointError
from quire.text.tokenizer import Tokenizer
from quire.text.tokenizer_config import TokenizerConfig, TokenSpec
from quire.weights import source
from quire.weights.source import Checkpoint, ModelSource, TensorInfo
from tests.engine.checkpoints import TEMPLATE, write_checkpoint

PROMPT = [7, 3, 11, 5]


class Source:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = torch.load(path, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} was not saved by torch") from error

    def config(self) -> dict[str, object]:
        return dict(self.content["config"])

    def generation_config(self) -> dict[str, object]:
        return {"temperature": 0.0, "eos_token_id": 2}

    def tokenizer(self) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.content["tokenizer"])
        named = {"eos_token": TokenSpec("<|eos|>"), "bos_token": TokenSpec("<|bos|>")}
        return Tokenizer(
            backend, TokenizerConfig(named_tokens=named, chat_templates={"default": TEMPLATE})
        )

    def open(self) -> Checkpoint:
        return Memory(self.path.name, self.content["tensors"])


class Memory:
    """Tensors in memory, one after the other."""

    def __init__(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.data = {
            name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            for name, tensor in tensors.items()
        }
        self.tensors: dict[str, TensorInfo] = {}
        begin = 0
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            size = len(self.data[name])
            self.tensors[name] = TensorInfo(name, file, tuple(tensor.shape), dtype, begin, size)
            begin += size

    def read(self, info: TensorInfo, begin: int, into: memoryview) -> None:
        into[:] = self.data[info.name][begin : begin + len(into)]

    def check_unchanged(self) -> None:
        pass

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory, and the same model beside it as `model.saved`."""
    monkeypatch.setitem(source.FILES, ".saved", __name__)
    directory = tmp_path / "directory"
    write_checkpoint("llama", directory)
    content = {
        "config": json.loads((directory / "config.json").read_text()),
        "tokenizer": (directory / "tokenizer.json").read_text(),
        "tensors": load_file(directory / "model.safetensors"),
    }
    torch.save(content, tmp_path / "model.saved")
    return tmp_path


def serve(path: Path) -> LLM:
    return LLM(model=str(path), max_model_len=64, kv_cache_memory_bytes=1 << 22)


def test_it_serves_what_the_directory_serves(model: Path) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    chat = [{"role": "user", "content": "The quick brown fox"}]
    with serve(model / "directory") as llm:
        tokens = llm.generate([PROMPT], greedy)[0].outputs[0].token_ids
        text = llm.chat(chat, greedy)[0].outputs[0].text
    with serve(model / "model.saved") as llm:
        assert llm.generate([PROMPT], greedy)[0].outputs[0].token_ids == tokens
        assert llm.chat(chat, greedy)[0].outputs[0].text == text
        assert llm.get_default_sampling_params().temperature == 0.0


def test_a_damaged_file_is_named(model: Path) -> None:
    (model / "model.saved").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"model\.saved was not saved by torch"):
        serve(model / "model.saved")


def test_a_file_of_a_kind_that_nobody_registered(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(source.FILES, ".saved")
    with pytest.raises(CheckpointError, match="is a file; point to the directory"):
        serve(model / "model.saved")


def test_a_directory_is_safetensors(model: Path) -> None:
    opened: ModelSource = source.open_source(model / "directory")
    with opened.open() as checkpoint:
        assert checkpoint.tensors["lm_head.weight"].dtype == "float32"
