"""A quantized model divided among ranks has the bits of the whole, in every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from quire.kernels.base import Kernels
from quire.kernels.group import Group
from quire.kernels.select import create_kernels
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.quantization.online import read_online
from tests.models.harness import PagedHarness, Request
from tests.models.ranks import on_each_rank
from tests.models.variants import prompt_tokens

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 199, "hidden_size": 128,
    "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 40, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    "hidden_act": "silu", "rope_theta": 10000.0,
}  # fmt: skip
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def compressed(layout: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    if layout == "int-quantized":
        group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMATS: Mapping[str, Mapping[str, object]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
    "awq symmetric": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False},
    "gptq4": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
    "gptq4 zeros": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    "gptq3 zeros": {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False},
    "gptq8": {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False},
    "int4": compressed("pack-quantized", **INT4),
    "int4 zeros": compressed("pack-quantized", **{**INT4, "symmetric": False}),
    "w8a8": compressed("int-quantized", **INT8),
    "fp8 channels": compressed("float-quantized", **FP8),
    "fp8 tensor": compressed("float-quantized", **{**FP8, "strategy": "tensor"}),
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 64]},
    "mxfp4": compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    "mxfp8": compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32),
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    "modelopt fp8": {"quant_method": "modelopt", "quant_algo": "FP8"},
}  # fmt: skip
ONLINE = ("int4", "int8", "fp8_per_channel")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec_of(name: str) -> ModelSpec:
    if name in ONLINE:
        return replace(resolve_spec(CONFIG), quantization=read_online(name))
    return resolve_spec({**CONFIG, "quantization_config": dict(FORMATS[name])})


def logits(spec: ModelSpec, kernels: Kernels, group: Group | None = None) -> torch.Tensor:
    model = load_model(
        spec, None, dtype=torch.bfloat16, kernels=kernels, load_format="dummy", max_model_len=64,
        group=group,
    )  # fmt: skip
    harness = PagedHarness(model, num_blocks=8)
    return harness.prefill(Request(prompt_tokens(20)), chunk=9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [*FORMATS, *ONLINE])
def test_ranks_have_the_bits_of_the_whole(name: str, tied: bool) -> None:
    """Random weights have the values of the whole at each rank. Heads of 40 columns and 3 ranks: the parts
    begin inside of words, groups of rows and panels."""
    kernels = create_kernels("auto")
    spec = replace(spec_of(name), tie_word_embeddings=tied)
    expected = logits(spec, kernels)
    assert expected.isfinite().all() and len(expected.unique()) > 20

    @torch.inference_mode()
    def work(group: Group) -> torch.Tensor:
        return logits(spec.divided(group.rank, group.size), kernels, group)

    for size in (2, 3):
        for each in on_each_rank(size, work):
            assert torch.equal(each, expected), size
