"""A weight format added in one file, this one: int8 with a scale for each output, stored inputs first as in
AWQ and GPTQ, and kept so in memory. It is read, sharded, planned and computed like a real one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import quantization
from quire.errors import CheckpointError, UnsupportedModelError
from quire.kernels.base import Kernels, LayerKernels, LinearProduct
from quire.kernels.select import create_kernels
from quire.layers.linear import Linear
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.quantization.base import (
    LinearMethod,
    LinearPart,
    LinearShape,
    LinearState,
    TensorWant,
    bias_wants,
)
from quire.quantization.unquantized import UNQUANTIZED
from quire.weights.load import load_weights
from quire.weights.safetensors import SafetensorsCheckpoint
from quire.weights.source import open_source
from tests.models.harness import PagedHarness, Request
from tests.models.variants import build_reference, prompt_tokens, save

CONFIG = {"quant_method": "int8_columns", "ignore": ["lm_head", "model.embed_tokens"]}

# ---- the format ------------------------------------------------------------------------------------------


def read_config(config: Mapping[str, object]) -> Int8Columns:
    ignore = config["ignore"]
    assert isinstance(ignore, list)
    return Int8Columns(tuple(ignore))


@dataclass(frozen=True, slots=True)
class Int8Columns:
    """weight[n, k] = qweight[k, n] * scales[n]"""

    ignore: tuple[str, ...] = ()

    def weight_bytes(self, shape: LinearShape, dtype_bytes: int) -> int:
        if shape.parts[0].name in self.ignore:
            return UNQUANTIZED.weight_bytes(shape, dtype_bytes)
        bias = dtype_bytes if shape.bias else 0
        return shape.num_outputs * (shape.in_features + 4 + bias)

    def create(
        self, shape: LinearShape, *, dtype: torch.dtype, kernels: LayerKernels
    ) -> LinearState:
        if shape.parts[0].name in self.ignore:
            return UNQUANTIZED.create(shape, dtype=dtype, kernels=kernels)
        return Int8State(shape, dtype, kernels)


class Int8State:
    def __init__(self, shape: LinearShape, dtype: torch.dtype, kernels: LayerKernels) -> None:
        self.shape = shape
        self.product = Int8Product(shape, dtype, kernels)

    def wants(self, part: LinearPart) -> Sequence[TensorWant]:
        size, inputs = part.out_features, self.shape.in_features
        return [
            TensorWant("qweight", (inputs, size), ("int8",), (range(inputs), part.outputs)),
            TensorWant("scales", (size,), taken=(part.outputs,)),
            *bias_wants(self.shape, part),
        ]

    def load(self, index: int, suffix: str, first: int, rows: torch.Tensor) -> None:
        start = sum(len(part.outputs) for part in self.shape.parts[:index])
        if suffix == "qweight":
            count, width = rows.shape
            self.product.qweight[first : first + count, start : start + width] = rows
        else:
            kept = {"scales": self.product.scales, "bias": self.product.bias}[suffix]
            kept[start + first : start + first + len(rows)] = rows

    def finish(self) -> LinearProduct:
        return self.product


class Int8Product:
    """C cannot compute it, so the whole model is computed step by step."""

    def __init__(self, shape: LinearShape, dtype: torch.dtype, kernels: LayerKernels) -> None:
        self.kernels = kernels
        self.in_features, self.out_features = shape.in_features, shape.num_outputs
        self.qweight = torch.zeros(self.in_features, self.out_features, dtype=torch.int8)
        self.scales = torch.zeros(self.out_features, dtype=torch.float32)
        self.bias = torch.zeros(self.out_features, dtype=dtype)
        self.has_bias = shape.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dense = self.kernels.linear(
            in_features=self.in_features,
            out_features=self.out_features,
            dtype=x.dtype,
            bias=self.has_bias,
        )
        dense.fill(0, dequantized(self.qweight, self.scales).to(x.dtype))
        if self.has_bias:
            dense.fill_bias(0, self.bias)
        return dense(x)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


# ---- a checkpoint in it ----------------------------------------------------------------------------------


def dequantized(qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (qweight.float() * scales.float()).T.contiguous()


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(dim=1) / 127
    return (weight / scales[:, None]).round().to(torch.int8).T.contiguous(), scales


@dataclass(frozen=True)
class Pair:
    """The same model twice: its config and tensors as stored in int8, and dequantized."""

    quantized: Path
    floats: Path

    def spec(self, directory: Path) -> ModelSpec:
        return resolve_spec(json.loads((directory / "config.json").read_text()))


def write_pair(source: Path, target: Path) -> Pair:
    config = json.loads((source / "config.json").read_text())
    stored: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in name and name.endswith("_proj.weight"):
            qweight, scales = quantized(tensor)
            stored[name.replace("weight", "qweight")] = qweight
            stored[name.replace("weight", "scales")] = scales
            floats[name] = dequantized(qweight, scales)
        else:
            stored[name] = floats[name] = tensor
    pair = Pair(target / "quantized", target / "floats")
    for directory, tensors, more in (
        (pair.quantized, stored, {"quantization_config": CONFIG}),
        (pair.floats, floats, {}),
    ):
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({**config, **more}))
    return pair


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantization.METHODS, "int8_columns", __name__)


@pytest.fixture(params=["llama", "qwen2", "llama-mha-tied"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    save(build_reference(request.param), tmp_path / "reference")
    return write_pair(tmp_path / "reference", tmp_path)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return create_kernels("auto")


def logits(spec: ModelSpec, directory: Path | None, kernels: Kernels, dtype: torch.dtype):
    model = load_model(
        spec,
        open_source(directory) if directory else None,
        dtype=dtype,
        kernels=kernels,
        max_model_len=64,
        load_format="auto" if directory else "dummy",
    )
    return PagedHarness(model, num_blocks=8).prefill(Request(prompt_tokens(20)), chunk=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_the_dequantized_model_computes(
    pair: Pair, kernels: Kernels, dtype: torch.dtype
) -> None:
    spec, floats = pair.spec(pair.quantized), pair.spec(pair.floats)
    assert spec.quantization == read_config(CONFIG) and floats.quantization == UNQUANTIZED
    expected = logits(floats, pair.floats, kernels, dtype)
    assert torch.equal(logits(spec, pair.quantized, kernels, dtype), expected)


def test_memory_is_planned_by_what_the_format_holds(pair: Pair) -> None:
    spec = pair.spec(pair.quantized)
    with SafetensorsCheckpoint(pair.quantized) as checkpoint:
        stored = sum(math.prod(info.shape) * (1 if info.dtype == "int8" else 4)
                     for info in checkpoint.tensors.values())  # fmt: skip
    assert spec.weight_bytes(4) == stored
    assert spec.num_parameters() == pair.spec(pair.floats).num_parameters()


def test_random_weights(pair: Pair, kernels: Kernels) -> None:
    assert logits(pair.spec(pair.quantized), None, kernels, torch.float32).isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", [UNQUANTIZED, Int8Columns()])
def test_two_shards_make_the_whole(
    method: LinearMethod, bias: bool, kernels: Kernels, tmp_path: Path
) -> None:
    """Each computes half of the outputs. The numbers are whole, so every sum is exact."""
    parts, inputs = {"a": 12, "b": 4}, 10
    floats = {
        f"{name}.weight": torch.randint(-9, 9, (n, inputs)).float() for name, n in parts.items()
    }
    biases = {f"{name}.bias": torch.arange(float(n)) for name, n in parts.items()} if bias else {}
    tensors = {**floats, **biases}
    if isinstance(method, Int8Columns):
        tensors = dict(biases)
        for name, n in parts.items():
            tensors[f"{name}.qweight"] = floats[f"{name}.weight"].to(torch.int8).T.contiguous()
            tensors[f"{name}.scales"] = torch.ones(n)
    save_file(tensors, tmp_path / "model.safetensors")

    def shape(half: int | None = None) -> LinearShape:
        taken = {
            n: None if half is None else range(half * n // 2, (half + 1) * n // 2) for n in (12, 4)
        }
        stack = tuple(LinearPart(name, n, taken[n]) for name, n in parts.items())
        return LinearShape(inputs, stack, bias)

    shapes = [shape(), shape(0), shape(1)]
    linears = [
        Linear(shape, dtype=torch.float32, method=method, kernels=kernels) for shape in shapes
    ]
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        targets = [target for linear in linears for target in linear.targets()]
        load_weights(targets, checkpoint, dtype=torch.float32)
    whole, *products = (linear.bind() for linear in linears)
    x = torch.randint(-9, 9, (3, inputs)).float()
    expected = whole(x)
    reference = x @ torch.cat(list(floats.values())).T
    assert torch.equal(expected, reference + (torch.cat(list(biases.values())) if bias else 0))
    first, second = products[0](x), products[1](x)
    interleaved = [first[:, :6], second[:, :6], first[:, 6:], second[:, 6:]]
    assert torch.equal(torch.cat(interleaved, dim=1), expected)


# ---- what does not fit -----------------------------------------------------------------------------------


def test_a_format_that_nobody_registered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(quantization.METHODS, "int8_columns")
    with pytest.raises(UnsupportedModelError, match=r"int8_columns.*unquantized checkpoint"):
        pair.spec(pair.quantized)


def test_tensors_that_the_config_does_not_describe(pair: Pair, kernels: Kernels) -> None:
    spec, floats = pair.spec(pair.quantized), pair.spec(pair.floats)
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.0\S*qweight"):
        logits(spec, pair.floats, kernels, torch.float32)
    with pytest.raises(CheckpointError, match=r"scales.*it is quantized"):
        logits(floats, pair.quantized, kernels, torch.float32)
    path = pair.quantized / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.qweight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].to(torch.int32)}, path)
    with pytest.raises(CheckpointError, match=rf"{name} .*int32.* makes it int8"):
        logits(spec, pair.quantized, kernels, torch.float32)
