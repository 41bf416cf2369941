"""The worker's table of adapters: loading in a thread, slots, and what a bad one does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.kernels.select import create_kernels
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.runner.adapters import AdapterTable, LoadedAdapter
from quire.weights.adapter import check_adapter
from quire.weights.source import open_source
from tests.models.variants import build_reference, save
from tests.weights.adapter_writer import PREFIX, write_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    directory = save(build_reference("llama-mha-tied"), tmp_path_factory.mktemp("base"))
    spec = resolve_spec(json.loads((directory / "config.json").read_text()))
    return load_model(
        spec,
        open_source(directory),
        dtype=torch.float32,
        kernels=create_kernels("auto"),
        max_model_len=64,
    )


@pytest.fixture
def make(model: DecoderModel, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """(key, directory) of a new adapter."""

    def write(seed: int, **config: object) -> tuple[str, Path]:
        path = write_adapter(tmp_path / str(seed), model.spec, ["q_proj"], seed=seed, **config)  # type: ignore[arg-type]
        return check_adapter(path, model.spec, max_rank=8).key(f"a{seed}"), path

    return write


def ended(table: AdapterTable) -> LoadedAdapter:
    deadline = time.monotonic() + 60
    while not (found := table.poll()):
        table.wait(1.0)
        assert time.monotonic() < deadline
    [one] = found
    return one


def test_slots_are_given_and_taken_back(
    model: DecoderModel, make: Callable[..., tuple[str, Path]]
) -> None:
    table = AdapterTable(model, max_rank=8, slots=2)
    assert table.acquire(None) == -1
    table.release(-1)
    keys = []
    for seed in range(3):
        key, path = make(seed)
        table.load(key, path)
        loaded = ended(table)
        assert loaded.error is None and loaded.key == key and loaded.num_bytes > 0
        keys.append(key)
    assert table.num_bytes == 3 * loaded.num_bytes
    first, second = table.acquire(keys[0]), table.acquire(keys[1])
    assert sorted([first, second]) == [0, 1]
    assert table.acquire(keys[0]) == first
    table.release(second)
    assert table.acquire(keys[2]) == second  # the only slot that is not in use
    table.release(first)
    table.drop(keys[0])  # still in use
    assert table.packed.rows(torch.tensor([first], dtype=torch.int32)) is not None
    table.release(first)
    with pytest.raises(ValueError, match="not in the table"):
        table.packed.rows(torch.tensor([first], dtype=torch.int32))
    assert table.acquire(keys[1]) == first
    assert table.num_bytes == 2 * loaded.num_bytes
    table.load(keys[1], Path("nowhere"))  # loaded already
    assert not table.poll()


def test_one_that_is_dropped_while_it_loads_is_not_polled(
    model: DecoderModel, make: Callable[..., tuple[str, Path]]
) -> None:
    table = AdapterTable(model, max_rank=8, slots=1)
    table.load(*make(0))
    table.drop(make(0)[0])
    other = make(1)
    table.load(*other)
    assert ended(table).key == other[0]
    assert table.num_bytes == table._entries[other[0]].packed.num_bytes


def test_what_cannot_be_loaded(
    model: DecoderModel, make: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    table = AdapterTable(model, max_rank=8, slots=1)
    key, path = make(0)
    table.load(key.partition("@")[0] + "@" + "0" * 32, path)
    assert "have changed" in (ended(table).error or "")
    table.load("gone@0", tmp_path / "gone")
    assert "no adapter_config.json" in (ended(table).error or "")
    wide = AdapterTable(model, max_rank=3, slots=1)
    wide.load(key, path)
    assert "rank 4" in (ended(wide).error or "")
    broken = torch.full((64, 4), torch.nan)
    change = {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight": broken}
    table.load(*make(2, change=change))
    error = ended(table).error
    assert error is not None and "NaN" in error and str(tmp_path) not in error
    table.load(key, path)  # the table is unharmed
    assert ended(table).error is None


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_copy_of_the_base_embedding_is_compared(
    name: str, model: DecoderModel, tmp_path: Path
) -> None:
    """PEFT saves it with an adapter of an embedding or a head; with another content, it was trained too."""
    path = write_adapter(tmp_path, model.spec, ["q_proj", name])
    file = path / "adapter_model.safetensors"
    embedding = model.embedded.rows(torch.arange(model.spec.vocab_size))  # type: ignore[union-attr]
    for wrong in (False, True):
        embedding[150, 3] += wrong
        tensors = {**load_file(file), f"{PREFIX}{name}.base_layer.weight": embedding.clone()}
        save_file(tensors, file)
        table = AdapterTable(model, max_rank=8, slots=1)
        table.load(check_adapter(path, model.spec, max_rank=8).key("a"), path)
        assert ("differs from the model's" in (ended(table).error or "")) == wrong
