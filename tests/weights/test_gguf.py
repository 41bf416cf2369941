"""GGUF files of every architecture compute what the checkpoint does that they were converted from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.builtin import MODEL_DIR
from quire.errors import CheckpointError, UnsupportedModelError
from quire.kernels.base import Kernels
from quire.kernels.select import create_kernels
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.quantization.gguf import FORMATS
from quire.weights.gguf import Source
from quire.weights.gguf_config import FAMILIES, hf_name
from quire.weights.source import ModelSource, open_source
from tests.models.harness import PagedHarness, Request
from tests.models.variants import YARN, build_reference, prompt_tokens, rope, save
from tests.quantization.gguf_rows import values
from tests.weights.gguf_writer import (
    Stored,
    convert,
    gguf_name,
    stored,
    tokenizer_metadata,
    write_gguf,
)

SAME = [
    "llama", "llama-mha-tied", "llama-attention-bias", "llama-mlp-bias", "llama-head-dim",
    "llama-linear", "llama-yarn", "mistral-full", "qwen2", "qwen3", "phi3", "phi3-partial-tied",
    "gemma2", "gemma3", "olmo2", "olmo3", "granite", "smollm3",
]  # fmt: skip
CLOSE = ["llama-llama3", "phi3-longrope-short", "phi3-longrope-long"]
"""Their frequencies are rounded when they are stored as divisors."""

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {"num_hidden_layers": 7, "layer_types": None},
    "olmo3": {"rope_parameters": {"full_attention": YARN, "sliding_attention": rope("default")}},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": None},
}
"""Of the variants, to what a file can say."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return create_kernels("auto")


@pytest.fixture
def reference(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: save(build_reference(name, **CHANGES.get(name, {})), tmp_path / name)


def logits(source: ModelSource, spec: ModelSpec, kernels: Kernels) -> torch.Tensor:
    model = load_model(
        spec, source, dtype=torch.float32, kernels=kernels, max_model_len=spec.context_length
    )
    return PagedHarness(model, num_blocks=8).prefill(Request(prompt_tokens(40)), chunk=40)


def both(directory: Path, file: Path, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
    original, converted = open_source(directory), open_source(file)
    return tuple(
        logits(each, resolve_spec(each.config()), kernels) for each in (original, converted)
    )


@pytest.mark.parametrize("name", SAME + CLOSE)
def test_it_computes_what_the_original_does(
    name: str, reference: Callable[[str], Path], tmp_path: Path, kernels: Kernels
) -> None:
    directory = reference(name)
    config = json.loads((directory / "config.json").read_text())
    if "gemma" in name:  # not in the file: that of the largest model, or the head's size
        config["query_pre_attn_scalar"] = config["head_dim"]
        (directory / "config.json").write_text(json.dumps(config))
    file = write_gguf(tmp_path / "model.gguf", *convert(directory))
    expected, got = both(directory, file, kernels)
    if name in SAME:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_names_are_those_of_gguf() -> None:
    """As the `gguf` package maps them."""
    gguf = pytest.importorskip("gguf")
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for family in FAMILIES:
        known = gguf.get_tensor_name_map(arch[family], 2)
        names = [
            f"model.layers.1.{part}.weight"
            for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.up_proj")
        ]
        names += [
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.0.input_layernorm.weight",
        ]
        names += [
            f"model.layers.0.{part}.weight"
            for part in (
                "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.qkv_proj",
            )
        ]  # fmt: skip
        for name in names:
            theirs = known.get_name(name, try_suffixes=(".weight",))
            if theirs is not None and not (family == "phi3" and "up_proj" in name):
                assert gguf_name(family, name) == theirs
                assert hf_name(FAMILIES[family], theirs) == name
        for name in gguf.MODEL_TENSORS[arch[family]]:
            theirs = gguf.TENSOR_NAMES[name].format(bid=0)
            assert hf_name(FAMILIES[family], f"{theirs}.weight") != f"{theirs}.weight" or any(
                part in theirs for part in ("exp", "inp")
            ), theirs


@pytest.mark.parametrize("name", ["llama-attention-bias", "qwen2", "phi3"])
@pytest.mark.parametrize("matrices", ["float16", "bfloat16"])
def test_floats_of_16_bits_are_not_quantized(
    name: str, matrices: str, reference: Callable[[str], Path], tmp_path: Path, kernels: Kernels
) -> None:
    directory = reference(name)
    model = build_reference(name).to(getattr(torch, matrices))
    expected_dir = save(model, tmp_path / "rounded")
    file = write_gguf(tmp_path / "model.gguf", *convert(directory, matrices=matrices))
    source = open_source(file)
    config = source.config()
    assert "quantization_config" not in config and config["dtype"] == matrices
    got = logits(source, resolve_spec(config), kernels)
    original = open_source(expected_dir)
    expected = logits(original, resolve_spec(original.config()), kernels)
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)  # norms were rounded too


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "qwen2", "phi3"])
@pytest.mark.parametrize(
    ("matrices", "head"), [("q8_0", "q8_0"), ("q4_0", "q8_0"), ("q4_0", "float16")]
)
def test_quantized_it_computes_what_the_dequantized_model_does(
    name: str,
    matrices: str,
    head: str,
    reference: Callable[[str], Path],
    tmp_path: Path,
    kernels: Kernels,
) -> None:
    """q, k and v in one stack, the head tied or not, its embedding quantized or not."""
    directory = reference(name)
    metadata, tensors = convert(directory, matrices=matrices, head=head)
    file = write_gguf(tmp_path / "quantized.gguf", metadata, tensors)
    floats = {key: stored(dequantized(value)) for key, value in tensors.items()}
    plain = write_gguf(tmp_path / "floats.gguf", metadata, floats)
    sources = open_source(file), open_source(plain)
    specs = [resolve_spec(source.config()) for source in sources]
    assert (specs[0].embedding is None) == (specs[0].tie_word_embeddings or head == "float16")
    got, expected = (logits(*pair, kernels) for pair in zip(sources, specs, strict=True))
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def dequantized(value: Stored) -> torch.Tensor:
    kind, shape, data = value
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if kind not in FORMATS:
        return raw.view(getattr(torch, kind)).view(shape).float()
    return values(kind, raw.view(shape[0], -1))


@pytest.mark.parametrize("rows", [(0, 1), (3, 20), (0, 64), (23, 24), (24, 48), (60, 64)])
@pytest.mark.parametrize("kind", ["float16", "q4_0"])
def test_permuted_rows_are_put_back_from_any_row_on(
    rows: tuple[int, int], kind: str, reference: Callable[[str], Path], tmp_path: Path
) -> None:
    """Pieces of a tensor end within heads."""
    directory = reference("llama")
    metadata, tensors = convert(directory, matrices=kind)
    file = write_gguf(tmp_path / "model.gguf", metadata, tensors)
    name, first, end = "model.layers.0.self_attn.q_proj.weight", *rows
    with Source(file).open() as checkpoint:
        info = checkpoint.tensors[name]
        row = info.num_bytes // info.shape[0]
        into = bytearray((end - first) * row)
        checkpoint.read(info, first * row, memoryview(into))
    data = tensors["blk.0.attn_q.weight"][2]
    head = 16
    order = [
        start + 2 * (i % (head // 2)) + i // (head // 2)
        for start in range(0, 64, head)
        for i in range(head)
    ]
    expected = b"".join(data[row * i : row * (i + 1)] for i in order[first:end])
    assert bytes(into) == expected


def test_shards(reference: Callable[[str], Path], tmp_path: Path, kernels: Kernels) -> None:
    directory = reference("llama")
    metadata, tensors = convert(directory)
    file = write_gguf(tmp_path / "model.gguf", metadata, tensors, shards=3)
    expected, got = both(directory, file, kernels)
    assert torch.equal(got, expected)
    with pytest.raises(CheckpointError, match=r"2-of-00003\.gguf cannot be read: No such file"):
        (tmp_path / "model-00002-of-00003.gguf").unlink()
        Source(file).config()


def test_shards_of_different_models(reference: Callable[[str], Path], tmp_path: Path) -> None:
    metadata, tensors = convert(reference("llama"))
    file = write_gguf(tmp_path / "model.gguf", metadata, tensors, shards=2)
    second = tmp_path / "model-00002-of-00002.gguf"
    write_gguf(second, {"split.no": 1}, {})
    with pytest.raises(CheckpointError, match=r"one of 2 shards with \d+ tensors.*2 with \d+"):
        Source(file).open()
    write_gguf(second, {"split.no": 1}, tensors)
    with pytest.raises(CheckpointError, match="is in two shards"):
        Source(file).open()


def config_of(reference: Path, tmp_path: Path, **changes: object) -> dict[str, object]:
    """changes: of keys without the architecture, with _ for a dot; None removes one."""
    metadata, tensors = convert(reference)
    prefix = f"{metadata['general.architecture']}."
    for key, value in changes.items():
        metadata[prefix + key] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return Source(write_gguf(tmp_path / "changed.gguf", metadata, tensors)).config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, r"llama\.block_count is missing"),
        ({"attention.head_count": [4, 2]}, r"head_count array.*equal in all layers"),
        ({"attention.value_length": 8}, r"key_length 16 and value_length 8"),
        ({"rope.dimension_count": 1.5}, r"dimension_count is 1\.5"),
    ],
)
def test_metadata_that_does_not_fit(
    changes: dict[str, object], message: str, reference: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        config_of(reference("llama"), tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "mixture of experts is not supported"),
        ({"attention.clamp_kqv": 8.0}, r"llama\.attention\.clamp_kqv is 8\.0.*does not know"),
        ({"rope.scaling.type": "ntk"}, "rope_type.*supported rotary types"),
        ({"block_count": "two"}, "num_hidden_layers is 'two'"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_metadata_that_is_not_supported(
    changes: dict[str, object], message: str, reference: Callable[[str], Path], tmp_path: Path
) -> None:
    config = config_of(reference("llama"), tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_spec(config)


def test_an_expert_count_of_zero_is_none(reference: Callable[[str], Path], tmp_path: Path) -> None:
    resolve_spec(config_of(reference("llama"), tmp_path, expert_count=0))


def test_values_equal_in_all_layers(reference: Callable[[str], Path], tmp_path: Path) -> None:
    config = config_of(reference("llama"), tmp_path, **{"attention.head_count_kv": [2, 2]})
    assert config["num_key_value_heads"] == 2


def test_floats_are_the_decimals_that_they_came_from(
    reference: Callable[[str], Path], tmp_path: Path
) -> None:
    changes = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6}
    config = config_of(reference("llama"), tmp_path, **changes)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 1e6)


def test_the_27b_models_of_gemma(reference: Callable[[str], Path], tmp_path: Path) -> None:
    """Their scores are scaled by another size."""
    small = config_of(reference("gemma2"), tmp_path)
    large = config_of(reference("gemma2"), tmp_path, block_count=46)
    assert (small["query_pre_attn_scalar"], large["query_pre_attn_scalar"]) == (24, 16)


def test_an_architecture_that_is_not_read(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", {"general.architecture": "clip"}, {})
    with pytest.raises(UnsupportedModelError, match=r"architecture is 'clip'.*llama, qwen2"):
        Source(file).config()
    file = write_gguf(tmp_path / "y.gguf", {}, {})
    with pytest.raises(UnsupportedModelError, match="architecture is None"):
        Source(file).config()


def test_a_type_that_is_not_read(reference: Callable[[str], Path], tmp_path: Path) -> None:
    metadata, tensors = convert(reference("llama"))
    tensors["blk.1.ffn_down.weight"] = ("iq2_xs", (64, 256), bytes(64 * 74))
    config = Source(write_gguf(tmp_path / "x.gguf", metadata, tensors)).config()
    message = r"model\.layers\.1\.mlp\.down_proj\.weight is of GGUF's type iq2_xs.*Q4_K_M"
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_spec(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_embd.weight": None}, "no tensor token_embd"),
        ({"blk.0.ffn_up.weight": None}, r"lacks tensor model\.layers\.0\.mlp\.up_proj\.weight"),
        ({"blk.0.extra.weight": torch.ones(4)}, r"has tensor blk\.0\.extra\.weight, which"),
        ({"blk.0.ffn_up.weight": torch.ones(96, 32)}, r"blk\.0\.ffn_up\.weight.*\[96, 32\].*\[96, 64\]"),
        ({"blk.0.attn_q.weight": torch.ones(60, 64)}, "60 rows, for heads of 16"),
        ({"rope_freqs.weight": torch.ones(9)}, "short_factor.*a list of 8 numbers"),
        ({"rope_freqs.weight": torch.ones(8, dtype=torch.float16)}, r"rope_freqs\.weight is float16"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    change: dict[str, torch.Tensor | None],
    message: str,
    reference: Callable[[str], Path],
    tmp_path: Path,
    kernels: Kernels,
) -> None:
    metadata, tensors = convert(reference("llama"))
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = stored(tensor, str(tensor.dtype).removeprefix("torch."))
    source = Source(write_gguf(tmp_path / "x.gguf", metadata, tensors))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        logits(source, resolve_spec(source.config()), kernels)


def test_norms_of_gemma_must_be_float32(reference: Callable[[str], Path], tmp_path: Path) -> None:
    metadata, tensors = convert(reference("gemma2"))
    tensors["output_norm.weight"] = stored(torch.ones(64), "float16")
    with pytest.raises(CheckpointError, match=r"output_norm\.weight is float16"):
        Source(write_gguf(tmp_path / "x.gguf", metadata, tensors)).open()


def test_planned_memory_is_that_of_the_products(
    reference: Callable[[str], Path], tmp_path: Path
) -> None:
    metadata, tensors = convert(reference("llama"), matrices="q8_0")
    spec = resolve_spec(Source(write_gguf(tmp_path / "x.gguf", metadata, tensors)).config())
    floats = resolve_spec(open_source(reference("llama")).config())
    assert spec.num_parameters() == floats.num_parameters()
    linears = sum(
        -(-len(part.outputs) // 64) * 64 * linear.in_features // 32 * 34
        for linear in spec.linears()
        for part in linear.parts
    )
    assert spec.weight_bytes(2) == linears + 5 * 64 * 2
    assert spec.embedding is not None


def test_random_weights_need_no_tensors(
    reference: Callable[[str], Path], tmp_path: Path, kernels: Kernels
) -> None:
    metadata, tensors = convert(reference("llama"), matrices="q4_0")
    spec = resolve_spec(Source(write_gguf(tmp_path / "x.gguf", metadata, tensors)).config())
    load_model(
        spec, None, dtype=torch.bfloat16, kernels=kernels, max_model_len=32, load_format="dummy"
    )


def test_it_is_read_without_torch(reference: Callable[[str], Path], tmp_path: Path) -> None:
    """The server's front end does not import it."""
    metadata, tensors = convert(reference("llama"), matrices="q8_0")
    metadata |= tokenizer_metadata(MODEL_DIR, pre="smollm")
    file = write_gguf(tmp_path / "model.gguf", metadata, tensors)
    code = (
        "import sys; from pathlib import Path; from quire.weights.source import open_source;"
        "from quire.models.registry import resolve_spec;"
        f"source = open_source(Path({str(file)!r})); source.tokenizer();"
        "resolve_spec(source.config()).weight_bytes(2);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'gguf', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
