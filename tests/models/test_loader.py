"""From a directory to a model: shards, dtypes, tied heads, random weights, misfits."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError, ConfigError
from quire.kernels.base import Kernels
from quire.kernels.select import create_kernels
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.weights.source import open_source
from tests.models.harness import PagedHarness, Request
from tests.models.published import SMOLLM2_135M
from tests.models.variants import build_reference, prompt_tokens, reference_logits, save

TOKENS = prompt_tokens(30)
Checkpoint = Callable[..., tuple[transformers.PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def native() -> Kernels:
    return create_kernels("auto")


def spec_of(directory: Path, **changes: object) -> ModelSpec:
    return resolve_spec({**json.loads((directory / "config.json").read_text()), **changes})


def load(directory: Path, kernels: Kernels, dtype: torch.dtype = torch.float32) -> DecoderModel:
    return load_model(
        spec_of(directory), open_source(directory), dtype=dtype, kernels=kernels, max_model_len=256
    )


def logits(model: DecoderModel) -> torch.Tensor:
    return PagedHarness(model, num_blocks=8).prefill(Request(list(TOKENS)), chunk=10**6)


def change_weights(source: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with tensors replaced or, where None, removed."""
    tensors = load_file(source / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_shards_equal_a_single_file(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path
) -> None:
    reference, directory = checkpoint("qwen2-windows")
    save(reference, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    expected = logits(load(directory, native))
    assert torch.equal(logits(load(tmp_path, native)), expected)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert torch.equal(logits(load(tmp_path, native)), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_stored_dtype_loads_as_any(
    checkpoint: Checkpoint,
    native: Kernels,
    stored: torch.dtype,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    """Loading converts each value as `Tensor.to` does: the same as a checkpoint stored converted."""
    _, directory = checkpoint("llama")
    weights = load_file(directory / "model.safetensors")
    as_stored = {name: tensor.to(stored) for name, tensor in weights.items()}
    for name, content in (
        ("given", as_stored),
        ("converted", {k: v.to(dtype) for k, v in as_stored.items()}),
    ):
        (tmp_path / name).mkdir()
        change_weights(directory, tmp_path / name, **content)
    model = load(tmp_path / "given", native, dtype)
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(load(tmp_path / "converted", native, dtype)))


def test_a_tied_model_ignores_a_stored_head(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path
) -> None:
    _, directory = checkpoint("qwen2")
    head = {"lm_head.weight": torch.zeros(199, 64)}
    change_weights(directory, tmp_path, **head)
    assert torch.equal(logits(load(tmp_path, native)), logits(load(directory, native)))


def renamed(source: Path, target: Path, prefix: str, head: str, **more: torch.Tensor) -> Path:
    """A copy of a checkpoint with another prefix for `model.` and another name for the head."""
    names = {"lm_head.weight": head}
    tensors = {
        names.get(name, prefix + name.removeprefix("model.")): tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    target.mkdir(exist_ok=True)
    save_file(tensors | more, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


NAMINGS = [
    ("", "lm_head.weight"),
    ("module.model.", "module.lm_head.weight"),
    ("_orig_mod.model.", "_orig_mod.lm_head.weight"),
    ("base_model.model.model.", "base_model.model.lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("transformer.", "lm_head.weight"),
]


@pytest.mark.parametrize(("prefix", "head"), NAMINGS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-full"])
def test_other_namings_give_the_same_model(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path, name: str, prefix: str, head: str
) -> None:
    _, directory = checkpoint(name)
    buffers = {
        f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        f"{prefix}layers.1.attn.masked_bias": torch.tensor(-1e4),
        f"{prefix}layers.1.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        f"{prefix}embed_positions.weights": torch.ones(4, 4),
    }
    other = renamed(directory, tmp_path, prefix, head, **buffers)
    assert torch.equal(logits(load(other, native)), logits(load(directory, native)))


@pytest.mark.parametrize("name", ["llama-mha-tied", "qwen3"])
def test_a_base_model_as_auto_model_saves_it(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path, name: str
) -> None:
    """`AutoModel.save_pretrained`: no `model.`, no head, and an architecture that ends in Model."""
    reference, _ = checkpoint(name)
    save(reference.model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(reference.model).__name__]
    if config["tie_word_embeddings"]:
        expected = reference_logits(reference, TOKENS)
        torch.testing.assert_close(logits(load(tmp_path, native)), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight.*tie_word_emb"):
            load(tmp_path, native)


def test_a_tied_model_with_only_a_head(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path
) -> None:
    """transformers ties both ways: whichever of the two is there is the embedding."""
    _, directory = checkpoint("qwen2")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    moved = {"lm_head.weight": embedding, "model.embed_tokens.weight": None}
    change_weights(directory, tmp_path, **moved)
    assert torch.equal(logits(load(tmp_path, native)), logits(load(directory, native)))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(load(tmp_path, native)), reference_logits(reference, TOKENS), rtol=1e-4, atol=1e-4
    )


def test_a_stored_head_that_differs_from_the_tied_embedding_is_named(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, directory = checkpoint("qwen2")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    for head, warned in ((embedding.clone(), False), (embedding + 1, True)):
        change_weights(directory, tmp_path, **{"lm_head.weight": head})
        caplog.clear()
        load(tmp_path, native)
        assert ("lm_head.weight differ" in caplog.text) is warned


def test_the_text_model_of_a_multimodal_checkpoint(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path
) -> None:
    _, directory = checkpoint("mistral-full")
    towers = {
        "vision_tower.encoder.layers.0.input_layernorm.weight": torch.ones(4),
        "multi_modal_projector.linear_1.weight": torch.ones(4, 4),
    }
    other = renamed(
        directory, tmp_path, "language_model.model.", "language_model.lm_head.weight", **towers
    )
    assert torch.equal(logits(load(other, native)), logits(load(directory, native)))


def test_a_misfit_is_named_as_the_file_names_it(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path
) -> None:
    _, directory = checkpoint("llama")
    bad = {"layers.1.self_attn.q_proj.weight": torch.zeros(64, 32)}
    renamed(directory, tmp_path, "", "lm_head.weight", **bad)
    with pytest.raises(CheckpointError, match=r"tensor layers\.1\.self_attn\.q_proj\.weight in"):
        load(tmp_path, native)


def test_nothing_points_into_the_files_once_loaded(
    checkpoint: Checkpoint, native: Kernels, tmp_path: Path
) -> None:
    """Overwriting the file in place, as a new download would, must not change a running model."""
    _, directory = checkpoint("llama-mha-tied")
    change_weights(directory, tmp_path)
    model = load(tmp_path, native)
    before = logits(model)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(logits(model), before)


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"
BROKEN: list[tuple[Mapping[str, torch.Tensor | None], str]] = [
    ({Q: None}, f"lacks tensor {Q}"),
    ({"lm_head.weight": None}, r"lacks tensor lm_head\.weight"),
    ({Q: torch.zeros(64, 32)}, rf"{Q} .*\[64, 32\].*\[64, 64\]"),
    ({NORM: torch.zeros(64, 1)}, rf"{NORM} .*\[64, 1\].*\[64\]"),
    ({Q: torch.zeros(64, 64, dtype=torch.int8)}, f"{Q} .*int8"),
    ({Q: torch.zeros(64, 64, dtype=torch.float8_e4m3fn)}, f"{Q} .*float8_e4m3fn"),
    ({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, r"has tensor .*q_norm\.weight"),
    ({"model.layers.2.mlp.down_proj.weight": torch.ones(64, 96)}, r"has tensor model\.layers\.2"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN, ids=lambda value: str(value)[:60])
def test_a_checkpoint_that_does_not_fit_its_config(
    checkpoint: Checkpoint,
    native: Kernels,
    tmp_path: Path,
    changes: Mapping[str, torch.Tensor | None],
    message: str,
) -> None:
    _, directory = checkpoint("llama")
    change_weights(directory, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, native)


def test_dummy_weights_need_no_files(native: Kernels) -> None:
    spec = resolve_spec({**SMOLLM2_135M, "num_hidden_layers": 2, "vocab_size": 512})

    def model(seed: int) -> DecoderModel:
        return load_model(
            spec,
            None,
            dtype=torch.bfloat16,
            kernels=native,
            load_format="dummy",
            max_model_len=64,
            seed=seed,
        )

    first, again, other = (logits(model(seed)) for seed in (0, 0, 1))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_arguments_are_checked(checkpoint: Checkpoint, native: Kernels) -> None:
    _, directory = checkpoint("llama")
    spec = spec_of(directory)
    with pytest.raises(ConfigError, match=r"dtype is torch\.float64.*--dtype"):
        load_model(
            spec, open_source(directory), dtype=torch.float64, kernels=native, max_model_len=64
        )
    with pytest.raises(ConfigError, match="needs a model directory"):
        load_model(spec, None, dtype=torch.float32, kernels=native, max_model_len=64)


def test_weight_bytes_is_what_the_ledger_was_told(checkpoint: Checkpoint, native: Kernels) -> None:
    for name in ("llama", "qwen2", "qwen3"):
        _, directory = checkpoint(name)
        model = load(directory, native)
        elements = sum(math.prod(target.shape) for target in model.targets())
        assert model.spec.weight_bytes(4) == 4 * elements == 4 * model.spec.num_parameters()


def test_old_rotary_spelling_gives_the_same_model(checkpoint: Checkpoint, native: Kernels) -> None:
    """A config as transformers 4 wrote it, beside the weights transformers 5 wrote."""
    _, directory = checkpoint("llama-llama3")
    config = json.loads((directory / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    old = {**config, "rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    assert resolve_spec(old) == spec_of(directory)


def test_dynamic_rope_beyond_its_context_equals_one_long_pass_of_transformers(
    native: Kernels, tmp_path: Path
) -> None:
    """A fixed base for max_model_len: what transformers uses for a sequence of just that length."""
    reference = build_reference("llama-dynamic", max_position_embeddings=64)
    save(reference, tmp_path)
    tokens = prompt_tokens(160)
    model = load_model(
        spec_of(tmp_path),
        open_source(tmp_path),
        dtype=torch.float32,
        kernels=native,
        max_model_len=160,
    )
    ours = PagedHarness(model).prefill(Request(tokens), chunk=32)
    torch.testing.assert_close(ours, reference_logits(reference, tokens), rtol=1e-3, atol=1e-3)


def test_two_models_live_in_one_process(checkpoint: Checkpoint, native: Kernels) -> None:
    first, second = (load(checkpoint(name)[1], native) for name in ("llama", "qwen3"))
    alone = logits(first)
    logits(second)
    assert torch.equal(logits(first), alone)
    del second
    gc.collect()
    assert torch.equal(logits(first), alone)
