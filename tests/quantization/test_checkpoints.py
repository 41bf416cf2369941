"""Whole quantized checkpoints: those of other tools against their oracle, small ones against their floats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.attention.base import KVCache
from quire.config import EngineConfig, ModelConfig
from quire.engine.llm import LLM
from quire.engine.setup import resolve
from quire.errors import CheckpointError, ConfigError, ModelError, UnsupportedModelError
from quire.kernels.base import Kernels
from quire.kernels.select import create_kernels
from quire.layers.kv_scales import give_scales
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.quantization import NAMES, REFUSED
from quire.quantization.unquantized import UNQUANTIZED
from quire.sampling_params import SamplingParams
from quire.weights.source import open_source
from tests.models.harness import PagedHarness, Request
from tests.models.variants import build_reference, prompt_tokens, save
from tests.quantization.matrices import Tensors, headers
from tests.quantization.test_formats import some, some_scales, stored_awq, stored_gptq, words_of

SHARED = Path(os.environ.get("QUIRE_QUANTIZED", "/work/shared/quantized"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared checkpoints")


# ---- other tools' checkpoints ----------------------------------------------------------------------------


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["w4a16_g64", "w8a8", "fp8_block", "gptq4_g64_asym_v2", "awq_g64"])
def test_the_oracle_is_met(kind: str) -> None:
    oracle = json.loads((SHARED / kind / "oracle.json").read_text())
    tolerance, prompts = oracle["tolerance"], oracle["prompts"]
    expected, allowed, margin = prompts, tolerance["float32"], tolerance["margin"]
    if kind == "w8a8":  # which rounds its activations
        expected, allowed = oracle["activation_oracle"], tolerance["activations_float32"]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, prompt_logprobs=0)
    with LLM(str(SHARED / kind), dtype="float32", max_model_len=256) as llm:
        ids = [{"prompt_token_ids": prompt["ids"]} for prompt in prompts]
        outputs = llm.generate(ids, params, use_tqdm=False)
    differences = []
    for prompt, wanted, output in zip(prompts, expected, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for token, at, logprob in zip(
            prompt["ids"][1:], output.prompt_logprobs[1:], wanted["logprobs"], strict=True
        ):
            differences.append(abs(at[token].logprob - logprob))
        greedy = output.outputs[0].token_ids
        first = next((i for i, pair in enumerate(zip(greedy, wanted["greedy"], strict=True))
                      if pair[0] != pair[1]), None)  # fmt: skip
        assert first is None or wanted["margins"][first] < margin, (greedy, wanted)
    assert sum(differences) / len(differences) < allowed


# ---- small ones ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return create_kernels("auto")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("floats")
    save(build_reference("llama"), directory)
    return directory


def write(
    directory: Path, floats: Path, config: Mapping[str, object] | None, tensors: Tensors
) -> Path:
    """The model in `floats` with other tensors: those of a matrix replace it. config: None for no field."""
    matrices = {name.rpartition(".")[0] for name in tensors if "weight" in name.rpartition(".")[2]}
    kept = {
        name: tensor
        for name, tensor in load_file(floats / "model.safetensors").items()
        if name.rpartition(".")[0] not in matrices
    }
    directory.mkdir(parents=True)
    save_file({**kept, **tensors}, directory / "model.safetensors")
    fields = json.loads((floats / "config.json").read_text())
    more = {} if config is None else {"quantization_config": dict(config)}
    (directory / "config.json").write_text(json.dumps({**fields, **more}))
    return directory


def loaded(directory: Path, kernels: Kernels, load_format: Any = "auto") -> DecoderModel:
    source = open_source(directory)
    return load_model(
        resolve_spec(source.config()), source, dtype=torch.float32, kernels=kernels, max_model_len=64,
        load_format=load_format,
    )  # fmt: skip


def logits(directory: Path, kernels: Kernels, load_format: Any = "auto") -> torch.Tensor:
    harness = PagedHarness(loaded(directory, kernels, load_format), num_blocks=8)
    return harness.prefill(Request(prompt_tokens(20)), chunk=8)


def attention(index: int, name: str) -> str:
    return f"model.layers.{index}.self_attn.{name}_proj"


Q = attention(0, "q")
K = attention(0, "k")
V = attention(0, "v")


def packed_int4(n: int, k: int, scale: float = 0.02) -> tuple[Tensors, torch.Tensor]:
    codes, scales = some((n, k), below=16), some_scales((n, k // 32)) * scale
    stored = {
        "weight_packed": torch.tensor([words_of(row.tolist(), 4) for row in codes], dtype=torch.int32),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k]),
    }  # fmt: skip
    return stored, (codes - 8).float() * scales.float().repeat_interleave(32, dim=1)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
MIXED = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "config_groups": {
        "a": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "b": {"targets": ["re:.*k_proj"], "weights": INT8, "format": "int-quantized"},
        "c": {"targets": [attention(1, "q")], "weights": FP8, "format": "float-quantized"},
    },
    "ignore": ["lm_head", "re:.*mlp.*", "re:.*o_proj", "re:.*v_proj"],
}


def mixed() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Stored, and as floats: q is int4 and in layer 1 FP8, k int8, v not quantized."""
    stored, plain = {}, {}
    for index in range(2):
        ints = some((32, 64), below=255).sub(127).to(torch.int8)
        scales = some_scales((32, 1), torch.float32) * 0.002
        by_name: dict[str, tuple[Tensors, torch.Tensor]] = {
            attention(index, "q"): packed_int4(64, 64),
            attention(index, "k"): ({"weight": ints, "weight_scale": scales}, ints.float() * scales),
        }  # fmt: skip
        if index == 1:
            weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
            float8 = weight.to(torch.float8_e4m3fn)
            scale = torch.tensor([0.1])
            more = {"weight": float8, "weight_scale": scale, "input_scale": torch.tensor([7.0])}
            by_name[attention(index, "q")] = more, float8.float() * scale
        for name, (tensors, floats) in by_name.items():
            stored |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
            plain[f"{name}.weight"] = floats
    return stored, plain


def test_formats_differ_within_a_stack(
    floats: Path, tmp_path: Path, kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    stored, plain = mixed()
    expected = logits(write(tmp_path / "plain", floats, None, plain), kernels)
    caplog.set_level("INFO")
    actual = logits(write(tmp_path / "stored", floats, MIXED, stored), kernels)
    assert torch.allclose(actual, expected, atol=2e-3)
    assert "2 of 15 linears int8, 1 of 15 linears int4 g32, 1 of 15 linears fp8, " in caplog.text
    source = open_source(tmp_path / "stored")
    spec = resolve_spec(source.config())
    assert spec.weight_bytes(4) < resolve_spec(open_source(floats).config()).weight_bytes(4)


def test_random_weights(floats: Path, tmp_path: Path, kernels: Kernels) -> None:
    """What the config says is measured, without the checkpoint's tensors."""
    directory = write(tmp_path / "model", floats, MIXED, {})
    (directory / "model.safetensors").unlink()
    assert logits(directory, kernels, "dummy").isfinite().all()


@pytest.mark.parametrize(
    ("kind", "file"),
    [("gptq", None), ("awq", None), ("fp8", None), ("gptq", "beside"), ("awq", "beside")],
)
def test_a_silent_config_is_completed(
    kind: str, file: str | None, floats: Path, tmp_path: Path, kernels: Kernels
) -> None:
    """From a file beside it, or from the tensors alone."""
    name = attention(0, "q")
    codes, zeros, scales = some((64, 64), below=16), some((64, 2), below=16), some_scales((64, 2))
    groups = torch.arange(64) // 32
    weight = (codes - zeros[:, groups]).float() * scales.float()[:, groups]
    tensors: Tensors = stored_awq(codes, zeros, scales)
    if kind == "gptq":
        tensors = stored_gptq(codes, zeros, scales, groups, bits=4, first_format=True)
    if kind == "fp8":
        values = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
        values = values.to(torch.float8_e4m3fn)
        tensors = {"weight": values, "weight_scale_inv": torch.tensor([[0.1]])}
        weight = values.float() * 0.1
    stored = {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    directory = write(tmp_path / "stored", floats, None, stored)
    if file is not None:
        beside = {
            "gptq": ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": False}),
            "awq": ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True}),
        }
        path, config = beside[kind]
        (directory / path).write_text(json.dumps(config))
    expected = logits(write(tmp_path / "plain", floats, None, {f"{name}.weight": weight}), kernels)
    assert torch.allclose(logits(directory, kernels), expected, atol=2e-3)


def test_another_prefix_than_ours(floats: Path, tmp_path: Path, kernels: Kernels) -> None:
    """The formats are found under the names that a multimodal model's file has."""
    stored, _ = mixed()
    directory = write(tmp_path / "stored", floats, MIXED, stored)
    expected = logits(directory, kernels)
    path = directory / "model.safetensors"
    save_file({f"language_model.{n}": tensor for n, tensor in load_file(path).items()}, path)
    assert torch.equal(logits(directory, kernels), expected)


def test_biases_of_zeros_are_dropped(floats: Path, tmp_path: Path, kernels: Kernels) -> None:
    stored, _ = mixed()
    expected = logits(write(tmp_path / "a", floats, MIXED, stored), kernels)
    more = {f"{Q}.bias": torch.zeros(64)}
    assert torch.equal(
        logits(write(tmp_path / "b", floats, MIXED, {**stored, **more}), kernels), expected
    )
    more[f"{Q}.bias"][3] = 0.5
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        logits(write(tmp_path / "c", floats, MIXED, {**stored, **more}), kernels)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"k_scale": 2.0, "v_scale": 3.0}, (2.0, 3.0)),
        ({"k_proj.output_scale": 2.0, "v_proj.output_scale": 3.0}, (2.0, 3.0)),
        ({"k_proj.k_scale": 2.0, "v_proj.v_scale": 3.0, "q_scale": 9.0}, (2.0, 3.0)),
        ({"kv_scale": 4.0}, (4.0, 4.0)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_scales_reach_a_cache_in_fp8(
    tensors: Mapping[str, float],
    expected: tuple[float, float],
    prefix: str,
    floats: Path,
    tmp_path: Path,
    kernels: Kernels,
) -> None:
    stored, _ = mixed()
    more = {f"model.layers.1.self_attn.{n}": torch.tensor([x]) for n, x in tensors.items()}
    directory = write(tmp_path / "model", floats, MIXED, {**stored, **more})
    path = directory / "model.safetensors"
    save_file({prefix + n: tensor for n, tensor in load_file(path).items()}, path)
    model = loaded(directory, kernels)
    for dtype in (torch.float8_e4m3fn, torch.float32):
        cache = KVCache(
            num_parts=2, num_blocks=2, num_kv_heads=2, head_dim=16, block_size=16, dtype=dtype
        )
        give_scales(cache, model.kv_scales, model.spec.kv.places())
        scales = [part.scales and [each.tolist() for each in part.scales] for part in cache.parts]
        ours = [[[1.0] * 2] * 2, [[scale] * 2 for scale in expected]]
        assert scales == (ours if dtype is torch.float8_e4m3fn else [None, None])
    name = f"{prefix}model.layers.1.self_attn.{next(iter(tensors))}"
    save_file({**load_file(path), name: torch.tensor([float("nan")])}, path)
    with pytest.raises(CheckpointError, match="scale that is not above 0"):
        loaded(directory, kernels)


# ---- bad ones --------------------------------------------------------------------------------------------


def bad(
    change: Mapping[str, torch.Tensor | None], floats: Path, directory: Path, kernels: Kernels
) -> None:
    stored = {**mixed()[0], **change}
    tensors = {name: tensor for name, tensor in stored.items() if tensor is not None}
    logits(write(directory, floats, MIXED, tensors), kernels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.weight_scale": None}, rf"lacks tensor {Q}\.weight_scale"),
        ({f"{Q}.weight_packed": None}, rf"lacks tensor {Q}\.weight_packed"),
        ({f"{Q}.weight_packed": torch.zeros(64, 7, dtype=torch.int32)}, r"packed .*\[64, 7\].*\[64, 8\]"),
        ({f"{Q}.weight_packed": torch.zeros(64, 8)}, r"weight_packed .*float32.*int32"),
        ({f"{Q}.weight_scale": torch.ones(64, 4)}, r"weight_scale .*\[64, 4\].*\[64, 2\]"),
        ({f"{Q}.weight_scale": torch.full((64, 2), float("nan"))}, r"q_proj\.weight_scale .*not a number"),
        ({f"{K}.weight_scale": torch.full((32, 1), float("inf"))}, rf"{K}\.weight_scale .*infinite"),
        ({f"{Q}.weight_shape": torch.tensor([64, 63])}, rf"{Q}\.weight_shape is \[64, 63\].*\[64, 64\]"),
        ({f"{Q}.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}, r"weight_zero_point"),
        (
            {f"{V}.weight_scale": torch.ones(32, 1), f"{V}.weight": torch.ones(32, 64)},
            r"v_proj\.weight_scale: it is quantized",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_tensors(
    change: Mapping[str, torch.Tensor | None],
    message: str,
    floats: Path,
    tmp_path: Path,
    kernels: Kernels,
) -> None:
    with pytest.raises(CheckpointError, match=message):
        bad(change, floats, tmp_path / "model", kernels)


def test_inputs_that_belong_to_no_group(floats: Path, tmp_path: Path, kernels: Kernels) -> None:
    codes, zeros, scales = some((64, 64), below=16), some((64, 2), below=16), some_scales((64, 2))
    for groups, act_order, message in [
        (torch.arange(64) % 3, True, r"q_proj\.g_idx does not divide the inputs into groups of 32"),
        (torch.arange(64) % 2, False, r"q_proj\.g_idx .*out of order.*desc_act"),
    ]:
        tensors = stored_gptq(codes, zeros, scales, groups, bits=4, first_format=True)
        config = {
            "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": act_order
        }  # fmt: skip
        stored = {f"{Q}.{suffix}": tensor for suffix, tensor in tensors.items()}
        directory = write(tmp_path / str(act_order), floats, config, stored)
        with pytest.raises(CheckpointError, match=message):
            logits(directory, kernels)


def changed(config: Mapping[str, Any], **weights: object) -> dict[str, Any]:
    groups = {"a": {"targets": ["Linear"], "weights": {**INT4, **weights}}}
    return {**config, "config_groups": groups}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(({"quant_method": name}, f"quant_method '{name}'.*use") for name in REFUSED),
        ({"quant_method": "nobodys"}, "quant_method 'nobodys'.*unquantized checkpoint"),
        ({"load_in_4bit": True}, "bitsandbytes.*--quantization int4"),
        ({"bits": 4, "group_size": 64, "tensors": {"a.biases": ("float16", (1,))}}, "'mlx'"),
        ({**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:x"}, "packing_format"),
        ({**GPTQ, "bits": 5}, "bits is 5, but it must be one of 2, 3, 4, 8"),
        ({**GPTQ, "group_size": 20}, "group_size is 20, but a group must have a multiple of 8"),
        ({**GPTQ, "checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'.*gptq_v2"),
        ({**GPTQ, "adapter": {"rank": 8}}, "adapter is .*does not know"),
        ({**GPTQ, "dynamic": {"+:(": {}}}, "no regular expression"),
        ({**GPTQ, "desc_act": "yes"}, "desc_act is 'yes', but it must be of type bool"),
        ({"quant_method": "gptq"}, "bits is missing"),
        ({**AWQ, "bits": 8}, "bits is 8"),
        ({**AWQ, "version": "gemv_fast"}, "version is 'gemv_fast'.*gemm"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'.*e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128, 12]}, "weight_block_size"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'.*NVFP4"),
        (changed(MIXED, num_bits=9), "num_bits is 9"),
        (changed(MIXED, group_size=4), "group_size is 4"),
        ({**MIXED, "format": "marlin-24", "config_groups": {"a": {"weights": INT4}}}, "marlin-24"),
        ({**MIXED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**MIXED, "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({**MIXED, "unheard_of": 1}, "unheard_of is 1.*does not know"),
    ],
)  # fmt: skip
def test_refused_before_weights_are_read(
    config: Mapping[str, object], message: str, floats: Path
) -> None:
    fields = json.loads((floats / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_spec({**fields, "quantization_config": config})


def test_a_group_that_does_not_divide(floats: Path) -> None:
    fields = json.loads((floats / "config.json").read_text())
    spec = resolve_spec({**fields, "quantization_config": {**AWQ, "group_size": 40}})
    method = spec.quantization
    [linear, *_] = spec.linears()
    with pytest.raises(
        UnsupportedModelError, match=r"q_proj\.\w+: 64 inputs are no multiple of 40"
    ):
        state = method.create(linear, dtype=torch.float32, kernels=create_kernels("reference"))
        state.wants(linear.parts[0])


@pytest.mark.parametrize("seed", range(20))
def test_files_with_any_bytes_in_them_are_read_or_refused(
    seed: int, floats: Path, tmp_path: Path, kernels: Kernels
) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored, _ = mixed()
    for name in stored:
        for _ in range(2):
            data = stored[name].contiguous().view(-1).view(torch.uint8).clone()
            at = int(torch.randint(len(data), (1,), generator=generator))
            data[at] = int(torch.randint(256, (1,), generator=generator))
            stored[name] = data.view(stored[name].dtype).view(stored[name].shape)
    message = None
    try:
        logits(write(tmp_path / "model", floats, MIXED, stored), kernels)
    except ModelError as error:
        message = str(error)
    assert message is None or "weight_s" in message


# ---- what users ask for ----------------------------------------------------------------------------------


def resolved(directory: Path, quantization: str | None) -> object:
    config = EngineConfig(model=ModelConfig(model=str(directory), quantization=quantization))
    return resolve(config).spec.quantization


def test_quantization_agrees_with_the_checkpoint(floats: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "model", floats, MIXED, mixed()[0])
    found = resolved(directory, None)
    assert found != UNQUANTIZED and resolved(directory, "compressed-tensors") == found
    for name in [*NAMES, "int8", "fp8_per_tensor"]:
        if name != "compressed-tensors":
            with pytest.raises(ConfigError, match=f"'{name}', but .* 'compressed-tensors'; leave"):
                resolved(directory, name)


@pytest.mark.parametrize("name", ["awq", "fp8", "fp8_per_block", "mxfp4"])
def test_quantization_of_a_plain_checkpoint(name: str, floats: Path) -> None:
    remedy = {"awq": "leave --quantization out", "mxfp4": "int4"}.get(name, "fp8_per_channel")
    with pytest.raises(
        ConfigError, match=f"'{name}', but the checkpoint is not quantized; .*{remedy}"
    ):
        resolved(floats, name)


def test_quantization_that_does_not_exist(floats: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be one of auto-round, .*gptq.*int8.*, got 'q4'"):
        resolved(floats, "q4")
    with pytest.raises(ConfigError, match=r"'bitsandbytes' is not supported; .*int4"):
        resolved(floats, "bitsandbytes")


@pytest.mark.parametrize("name", ["int8", "int8_per_channel_weight_only", "fp8_per_channel"])
def test_a_plain_checkpoint_is_quantized_while_it_is_loaded(name: str, floats: Path) -> None:
    assert resolved(floats, name) != UNQUANTIZED


def test_headers_reach_the_config(floats: Path, tmp_path: Path) -> None:
    stored, _ = mixed()
    config = open_source(write(tmp_path / "model", floats, MIXED, stored)).config()
    quantization = config["quantization_config"]
    assert isinstance(quantization, dict)
    found = headers({"weight_packed": stored[f"{Q}.weight_packed"]}, Q)
    assert found.items() <= quantization["tensors"].items()
    assert "quantization_config" not in open_source(floats).config()
