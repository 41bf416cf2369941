"""Heads from their files: through the configuration, and what does not fit is an error that says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.config import from_flat
from quire.engine.setup import locate, resolve
from quire.errors import CheckpointError, ConfigError, QuireError, UnsupportedModelError
from quire.speculative.heads import HeadDrafter
from quire.speculative.spec import HeadDraftSpec
from tests.engine.checkpoints import ServableCheckpoint, prompts, write_checkpoint
from tests.engine.test_exactness import tokens_of
from tests.speculative.reference_heads import save_head, tensors_of
from tests.speculative.test_heads import DRAWN, FORMS, GREEDY, make_llm

FLAT, TRAINED = FORMS["eagle3"], FORMS["speculators"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ServableCheckpoint:
    folder = tmp_path_factory.mktemp("target")
    return write_checkpoint("llama", folder, num_hidden_layers=4, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> ServableCheckpoint:
    """As published: Qwen2 with another layer."""
    folder = tmp_path_factory.mktemp("mimo")
    made = write_checkpoint("qwen2", folder, num_hidden_layers=4, tie_word_embeddings=False)
    path, weights = folder / "config.json", folder / "model.safetensors"
    own = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True,
           "num_nextn_predict_layers": 1}  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    save_file({**load_file(weights), **tensors_of(FORMS["mimo"], made.reference.config)}, weights)
    return made


def options(method: str, model: Path | None = None, **values: Any) -> dict[str, Any]:
    given = {"method": method, "num_speculative_tokens": 3, **values}
    return given if model is None else {**given, "model": str(model)}


@pytest.mark.parametrize("name", ["eagle", "eagle3", "speculators", "mimo"])
def test_a_head_of_the_configuration_changes_no_token(
    name: str, target: ServableCheckpoint, mimo: ServableCheckpoint, tmp_path: Path
) -> None:
    form, batch = FORMS[name], prompts(3, longest=40)
    used = mimo if name == "mimo" else target
    given = options(form.method)
    if name != "mimo":
        given["model"] = str(save_head(form, used.reference.config, tmp_path))
    with make_llm(used) as llm:
        expected = tokens_of(llm.generate(batch, DRAWN, use_tqdm=False))
    with make_llm(used, speculative_config=given, enable_sleep_mode=True) as llm:
        assert tokens_of(llm.generate(batch, DRAWN, use_tqdm=False)) == expected
        for level in (1, 2):
            llm.sleep(level)
            llm.wake_up()
            assert tokens_of(llm.generate(batch, DRAWN, use_tqdm=False)) == expected
        drafter = llm._core._core.executor.runner.drafter
        assert isinstance(drafter, HeadDrafter) and drafter._cache._valid.any()


def test_memory_of_a_head_is_planned(target: ServableCheckpoint, tmp_path: Path) -> None:
    head = save_head(FORMS["eagle3-embedding"], target.reference.config, tmp_path)
    model = {"model": str(target.directory), "max_model_len": 256}
    draft = resolve(
        locate(from_flat({**model, "speculative_config": options("eagle3", head)}))
    ).draft
    assert isinstance(draft, HeadDraftSpec)
    stored = load_file(head / "model.safetensors")
    counted = {n: t for n, t in stored.items() if "norm" not in n and t.dtype is torch.float32}
    tables = 256 * 16 * 4
    assert draft.weight_bytes == sum(t.numel() * 4 for t in counted.values()) + tables
    assert draft.slot_bytes == 2 * 2 * 16 * 4  # keys and values of two heads
    assert draft.head.has_embedding
    # A copy of the target's embedding, as EAGLE's files have, is not loaded.
    theirs = load_file(target.directory / "model.safetensors")["model.embed_tokens.weight"]
    save_file({**stored, "model.embed_tokens.weight": theirs}, head / "model.safetensors")
    draft = resolve(
        locate(from_flat({**model, "speculative_config": options("eagle3", head)}))
    ).draft
    assert isinstance(draft, HeadDraftSpec) and not draft.head.has_embedding


def test_layers_that_draft_are_left_out_without_speculation(
    mimo: ServableCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    [prompt] = prompts(1)
    with caplog.at_level(logging.INFO), make_llm(mimo) as llm:
        [tokens] = tokens_of(llm.generate([prompt], GREEDY, use_tqdm=False))
    assert tokens == mimo.greedy(prompt, len(tokens))
    assert caplog.text.count("left out tensor model.mtp_layers.0.") == 1


Change = Callable[[Path], None]


def config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def tensors(**changes: Any) -> Change:
    """By names with underscores for dots; None removes one."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        kept = load_file(path)
        for name, value in changes.items():
            kept[name.replace("__", ".")] = value
        save_file({name: each for name, each in kept.items() if each is not None}, path)

    return change


ZEROS = torch.zeros(100, dtype=torch.int64)
WRONG: dict[str, tuple[str, Change, type[QuireError], str]] = {
    "width": ("eagle", config(hidden_size=32), UnsupportedModelError, "hidden_size is 32, but the target's"),
    "vocabulary": ("eagle", config(vocab_size=100), UnsupportedModelError, "vocab_size is 100, .* 320"),
    "own vocabulary": ("eagle", config(draft_vocab_size=100), UnsupportedModelError, "try eagle3"),
    "layers": ("eagle3", config(num_hidden_layers=2), UnsupportedModelError, "num_hidden_layers is 2"),
    "field": ("eagle3", config(attention_sinks=4), UnsupportedModelError, "attention_sinks"),
    "family": ("eagle3", config(model_type="gemma2"), UnsupportedModelError, "model_type is 'gemma2'"),
    "target": ("eagle3", config(target_hidden_size=65), UnsupportedModelError, "target_hidden_size is 65"),
    "layer ids": ("eagle3", config(eagle_aux_hidden_state_layer_ids=[0, 2, 5]), UnsupportedModelError,
                  r"layer_ids is \[0, 2, 5\], but .* 0 to 4"),
    "not ids": ("eagle3", config(eagle_aux_hidden_state_layer_ids=7), UnsupportedModelError, "ids is 7"),
    "one state": ("eagle3", config(eagle_config={"use_aux_hidden_state": False}), UnsupportedModelError,
                  "eagle_config.use_aux_hidden_state is False"),
    "no ids": ("eagle3", tensors(d2t=None), CheckpointError, "lacks tensor d2t"),
    "offsets": ("eagle3", tensors(d2t=ZEROS + 300), CheckpointError, "ids from 300 to 399, .* has 320"),
    "dtype of offsets": ("eagle3", tensors(d2t=ZEROS.int()), CheckpointError, "d2t .* dtype int32"),
    "missing": ("eagle3", tensors(fc__weight=None), CheckpointError, "lacks tensor model.fc.weight"),
    "shape": ("eagle3", tensors(fc__weight=torch.zeros(64, 64)), CheckpointError, r"shape \[64, 64\]"),
    "unknown": ("eagle3", tensors(mask_hidden=torch.zeros(64)), CheckpointError, "mask_hidden"),
    "method": ("speculators", config(speculators_model_type="peagle"), UnsupportedModelError,
               "speculators_model_type is 'peagle', but with method 'eagle3'"),
    "no layer": ("speculators", config(transformer_layer_config=None), UnsupportedModelError,
                 "transformer_layer_config is None"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case: str, target: ServableCheckpoint, tmp_path: Path) -> None:
    name, change, error, message = WRONG[case]
    head = save_head(FORMS[name], target.reference.config, tmp_path)
    change(head)
    with pytest.raises(error, match=message):
        make_llm(target, speculative_config=options(FORMS[name].method, head)).close()


def test_options_that_do_not_go_together(target: ServableCheckpoint, tmp_path: Path) -> None:
    head = save_head(FLAT, target.reference.config, tmp_path)
    for given, error, message in [
        (options("mtp"), UnsupportedModelError, "needs layers .* num_nextn_predict_layers is 0"),
        (options("mtp", head), ConfigError, "uses layers of the model itself"),
        (options("eagle"), ConfigError, "needs a model"),
        (options("eagle3", head, quantization="int8"), ConfigError, "quantization is 'int8'"),
        (options("eagle3", tmp_path / "none"), CheckpointError, "none"),
    ]:
        with pytest.raises(error, match=message):
            make_llm(target, speculative_config=given).close()
    with pytest.raises(ConfigError, match="keeps only 24 tokens, and method eagle3"):
        folder = tmp_path / "windows"
        made = write_checkpoint("mistral-window", folder)
        make_llm(made, speculative_config=options("eagle3", head)).close()
