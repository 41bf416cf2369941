"""Quantizing while loading, and the rounding that it and `quire quantize` use."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import CheckpointError
from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import Scales, dequantize
from quire.kernels.select import create_kernels
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.quantization.online import GROUPS, ONLINE, read_online
from quire.quantization.rounding import LARGEST_FLOAT8, quantize, quantize_in_torch
from quire.weights.source import open_source
from tests.models.harness import PagedHarness, Request
from tests.models.variants import build_reference, prompt_tokens, save

INT4 = CodeFormat(bits=4, group=32, scale="bfloat16", zero=8)
FORMS = {
    "int8": CodeFormat(bits=8, zero=128),
    "int8 g64": CodeFormat(bits=8, group=64, scale="bfloat16", zero=128),
    "int8 zeros": CodeFormat(bits=8, scale="float16", offset="zero"),
    "int4": INT4,
    "int4 float16": replace(INT4, scale="float16", group=128),
    "int4 zeros": replace(INT4, zero=0, offset="zero"),
    "fp8": CodeFormat(bits=8, float8=True),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def weights(rows: int, width: int) -> torch.Tensor:
    """Normal ones with a few that are larger, in bfloat16."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    weight = torch.randn(rows, width, generator=generator) * 0.02
    weight[torch.rand(weight.shape, generator=generator) > 0.99] *= 4
    return weight.bfloat16()


def read_back(form: CodeFormat, weight: torch.Tensor) -> torch.Tensor:
    return dequantize(form, *quantize(weight, form))


@pytest.mark.parametrize("name", ["int8", "int8 g64", "int4", "int4 float16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_c_rounds_as_pytorch_does(name: str, dtype: torch.dtype) -> None:
    form, weight = FORMS[name], weights(67, 250).to(dtype)
    weight[3] = 0
    codes, scales = quantize(weight, form)
    expected, expected_scales = quantize_in_torch(weight, form)
    if form.bits == 8:  # nothing is summed
        assert torch.equal(codes, expected) and torch.equal(scales.scale, expected_scales.scale)
        return
    error, other = (
        (dequantize(form, *each) - weight.float()).square().sum()
        for each in ((codes, scales), (expected, expected_scales))
    )
    assert abs(error / other - 1) < 1e-4
    assert (scales.scale == expected_scales.scale).float().mean() > 0.99
    for bad in (torch.nan, torch.inf):
        weight[5, 7] = bad
        assert not quantize(weight, form)[1].scale[5, 0].isfinite()


def in_groups(form: CodeFormat, x: torch.Tensor) -> torch.Tensor:
    group = form.group or x.shape[1]
    missing = -x.shape[1] % group
    return torch.nn.functional.pad(x, (0, missing)).view(x.shape[0], -1, group)


@forms
@pytest.mark.parametrize("shape", [(1, 8), (65, 192), (7, 200), (300, 256)])
def test_weights_are_near_and_stored_as_the_format_says(
    form: CodeFormat, shape: tuple[int, int]
) -> None:
    weight = weights(*shape)
    codes, scales = quantize(weight, form)
    groups = (shape[0], form.num_groups(shape[1]))
    assert codes.shape == shape and codes.dtype is torch.uint8
    assert scales.scale.shape == groups and scales.scale.dtype is getattr(torch, form.scale)
    assert (scales.offset is not None) == (form.offset == "zero")
    assert form.float8 or int(codes.max()) < 1 << form.bits
    error = in_groups(form, dequantize(form, codes, scales) - weight.float())
    relative = error.square().mean().sqrt() / weight.float().square().mean().sqrt()
    assert relative < (0.03 if form.float8 else {8: 0.02, 4: 0.2}[form.bits])
    if (
        form.bits == 8 and not form.float8
    ):  # nothing is clipped: half a step, and the scale's rounding
        steps = error.abs().amax(-1) / scales.scale.float().abs()
        assert steps.max() < (0.501 if form.offset == "none" and not form.group else 1.1)


@forms
def test_a_row_does_not_depend_on_those_it_is_read_with(form: CodeFormat) -> None:
    weight = weights(500, 192)
    codes, scales = quantize(weight, form)
    for rows in (slice(0, 1), slice(130, 327), slice(499, 500)):
        part_codes, part = quantize(weight[rows], form)
        assert torch.equal(part_codes, codes[rows])
        assert torch.equal(part.scale, scales.scale[rows])
        assert part.offset is None or torch.equal(part.offset, scales.offset[rows])  # type: ignore[index]


@forms
def test_rows_of_zeros_and_what_is_not_finite(form: CodeFormat) -> None:
    weight = weights(4, 64)
    weight[1] = 0
    weight[2, 5] = torch.nan
    weight[3, 60] = -torch.inf
    codes, scales = quantize(weight, form)
    back = dequantize(form, codes[:2], Scales(*(s if s is None else s[:2] for s in scales)))
    assert back[1].eq(0).all() and back[0].isfinite().all()
    assert scales.scale[:2].isfinite().all()
    assert not scales.scale[2].isfinite().all() and not scales.scale[3].isfinite().all()


@pytest.mark.parametrize("offset", ["none", "zero"])
def test_the_search_finds_a_smaller_error_than_the_largest_weight_gives(offset: str) -> None:
    form = replace(INT4, zero=8 if offset == "none" else 0, offset=offset)
    weight = weights(512, 256)
    groups = in_groups(form, weight.float())
    if offset == "none":
        step = groups.abs().amax(-1, keepdim=True) / 7.5
        plain = (groups / step).round().clamp(-8, 7) * step
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low) / 15
        zero = (-low / step).round()
        plain = (((groups / step).round() + zero).clamp(0, 15) - zero) * step
    importance = groups.square() + groups.square().mean(-1, keepdim=True)
    found, expected = (
        (importance * (other - groups).square()).mean()
        for other in (in_groups(form, read_back(form, weight)), plain)
    )
    assert found < 0.92 * expected


def test_what_fits_the_codes_is_exact() -> None:
    codes = torch.randint(1, 16, (64, 128), dtype=torch.uint8)
    codes[:, ::32] = 0  # each group has its end
    step = torch.rand(64, 4).bfloat16() + 0.5
    weight = dequantize(INT4, codes, Scales(step))
    found, scales = quantize(weight, INT4)
    assert torch.equal(found, codes) and torch.equal(scales.scale, step)
    exact = torch.tensor([[LARGEST_FLOAT8, -1.0, 0.875, 2.0**-9, 0.0, -0.40625, 3.0, 15.0]])
    assert torch.equal(read_back(FORMS["fp8"], exact), exact)


# ---- while loading ---------------------------------------------------------------------------------------


def spec_of(directory: Path, name: str) -> ModelSpec:
    spec = resolve_spec(open_source(directory).config())
    return replace(spec, quantization=read_online(name))


def logits(spec: ModelSpec, directory: Path) -> torch.Tensor:
    model = load_model(
        spec,
        open_source(directory),
        dtype=torch.float32,
        kernels=create_kernels(),
        max_model_len=64,
    )
    return PagedHarness(model, num_blocks=8).prefill(Request(prompt_tokens(20)), chunk=8)


@pytest.fixture(params=["llama", "qwen2", "llama-mha-tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save(build_reference(request.param), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ONLINE)
def test_the_model_is_the_one_of_the_rounded_weights(
    checkpoint: Path, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = spec_of(checkpoint, name)
    rounded = load_file(checkpoint / "model.safetensors")
    matrices, expected_bytes = 0, 0
    for linear in spec.linears():
        for part in linear.parts:
            tensor = f"{part.name}.weight"
            form = spec.quantization.format_of(part.name).memory(  # type: ignore[attr-defined]
                replace(linear, parts=(part,))
            )
            is_head = part.name in ("lm_head", "model.embed_tokens")
            assert form.float8 == (name == "fp8_per_channel" and not is_head)
            assert form.bits == (4 if name == "int4" and not is_head else 8)
            rounded[tensor] = read_back(form, rounded[tensor])
            matrices += rounded[tensor].numel()
            expected_bytes += form.num_bytes(part.out_features, linear.in_features)
            expected_bytes += part.out_features * 2 if linear.bias else 0
    others = sum(tensor.numel() for tensor in rounded.values()) - matrices
    biases = sum(math.prod(t.shape) for n, t in rounded.items() if n.endswith("bias"))
    assert spec.weight_bytes(2) == expected_bytes + 2 * (others - biases)
    target = tmp_path_factory.mktemp("rounded")
    save_file(rounded, target / "model.safetensors")
    (target / "config.json").write_text((checkpoint / "config.json").read_text())
    floats = resolve_spec(open_source(target).config())
    # Not the same bits: products of codes round their inputs to 16 bits.
    assert torch.allclose(logits(spec, checkpoint), logits(floats, target), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("inputs", "group"), [(768, 128), (192, 64), (96, 32), (40, 32)])
def test_the_group_divides_the_inputs_if_it_can(inputs: int, group: int) -> None:
    from quire.quantization.base import LinearPart, LinearShape

    shape = LinearShape(inputs, (LinearPart("a", 8),), bias=False)
    assert read_online("int4").format_of("a").memory(shape).group == group
    assert group in GROUPS


def test_a_weight_that_is_nan_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .*--quantization"):
        logits(spec_of(checkpoint, "int4"), checkpoint)
