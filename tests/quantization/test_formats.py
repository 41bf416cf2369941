"""What the readers make of each format, bit for bit.

Golden files were made by the formats' own tools (`tests/data/quantized`). GPTQ, AWQ and FP8 matrices are also
packed here, number by number, from the formats' definitions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from quire.quantization.translate import unpack, unpack_awq_in_torch, unpack_in_torch
from tests.quantization.matrices import NAME, Golden, Tensors, dequantized, golden, method_of, sha

FILES = ("copied.safetensors", "compressed_tensors.safetensors", "gptq.safetensors")
GOLDEN = [each for file in FILES for each in golden(file)]


@pytest.mark.parametrize("each", GOLDEN, ids=lambda each: each.kind)
def test_golden_matrices(each: Golden) -> None:
    weight = dequantized(each.config, each.tensors, each.shape, step=16)
    if each.kind.startswith("gptq") and "v2" not in each.kind:
        weight = weight.half()  # GPTQModel rounds it
    assert sha(weight) == each.sha


# ---- packed here -----------------------------------------------------------------------------------------


def words_of(codes: Sequence[int], bits: int) -> list[int]:
    """A stream of bits, the lowest first, cut into signed words."""
    stream = sum(code << i * bits for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [stream >> 32 * i & 0xFFFFFFFF for i in range(count)]
    return [word - (word >> 31 << 32) for word in words]


def stored_gptq(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    *,
    bits: int,
    first_format: bool,
) -> Tensors:
    """codes: [N, K]. zeros, scales: [N, groups]. groups: [K]"""
    less = 1 if first_format else 0
    columns = [words_of(row.tolist(), bits) for row in codes]
    rows = [words_of([(z - less) % 2**bits for z in column.tolist()], bits) for column in zeros.T]
    return {
        "qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor(rows, dtype=torch.int32),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }


def stored_awq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(rows: torch.Tensor) -> torch.Tensor:
        words = [
            [words_of([row[c + i] for i in order], 4)[0] for c in range(0, len(row), 8)]
            for row in rows.tolist()
        ]
        return torch.tensor(words, dtype=torch.int32)

    return {
        "qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T.contiguous(),
    }  # fmt: skip


def some(shape: tuple[int, int], *, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def some_scales(shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.01).to(dtype)


def formula(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    return (codes - zeros[:, groups]).float() * scales.float()[:, groups]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("first_format", "symmetric"), [(True, False), (False, False), (True, True)]
)
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("order", ["none", "trivial", "shuffled"])
def test_gptq(bits: int, first_format: bool, symmetric: bool, group: int, order: str) -> None:
    n, k = 24 if bits == 4 else 32, 96  # with 64 the last group is smaller
    size = k if group == -1 else group
    groups = torch.arange(k) // size
    if order == "shuffled":
        groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(2))]
    codes, count = some((n, k), below=2**bits), int(groups.max()) + 1
    zeros, scales = some((n, count), below=2**bits, seed=3), some_scales((n, count))
    tensors = dict(stored_gptq(codes, zeros, scales, groups, bits=bits, first_format=first_format))
    if order == "none":
        del tensors["g_idx"]
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
        "desc_act": order != "none", "checkpoint_format": "gptq" if first_format else "gptq_v2",
    }  # fmt: skip
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    expected = formula(codes, zeros, scales, groups)
    assert torch.equal(dequantized(config, tensors, (n, k), step=6), expected)


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("names", [("bits", "group_size"), ("w_bit", "q_group_size")])
def test_awq(group: int, names: tuple[str, str]) -> None:
    n, k = 40, 96
    groups = torch.arange(k) // (k if group == -1 else group)
    count = int(groups.max()) + 1
    codes, zeros = some((n, k), below=16), some((n, count), below=16, seed=3)
    scales = some_scales((n, count))
    tensors = stored_awq(codes, zeros, scales)
    config = {"quant_method": "awq", names[0]: 4, names[1]: group, "zero_point": True}
    expected = formula(codes, zeros, scales, groups)
    assert torch.equal(dequantized(config, tensors, (n, k), step=8), expected)


def some_float8(shape: tuple[int, int]) -> torch.Tensor:
    """All finite values, in any order."""
    codes = some(shape, below=255)
    return torch.where(codes == 127, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (192, 320), (64, 72)])
def test_blocks_of_float8_begin_at_multiples_of_128(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """DeepSeek's kernel.py; transformers divides the rows by the number of blocks."""
    weight, (n, k) = some_float8(shape), shape
    scales = some_scales((-(-n // 128), -(-k // 128)), dtype)
    expected = torch.empty(shape)
    for i, j in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
        block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        expected[block] = weight[block].float() * scales[i, j].float()
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    tensors = {"weight": weight, "weight_scale_inv": scales}
    assert torch.equal(dequantized(config, tensors, shape), expected)


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.5), torch.tensor([0.25]), torch.full((24, 1), 2.0)]
)
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "modelopt"])
def test_a_scale_for_a_matrix_or_a_row(scale: torch.Tensor, method: str) -> None:
    weight = some_float8((24, 40))
    tensors = {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor([3.0])}
    config = {"quant_method": method} | ({"quant_algo": "FP8"} if method == "modelopt" else {})
    assert torch.equal(dequantized(config, tensors, (24, 40)), weight.float() * scale)


def test_modelopt_multiplies_by_the_scale_of_all() -> None:
    codes, scales = some((16, 64), below=16), some_float8((16, 4)).float().abs()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([table, -table])[codes]
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    tensors = {
        "weight": packed, "weight_scale": scales.to(torch.float8_e4m3fn), "weight_scale_2": torch.tensor(0.3),
    }  # fmt: skip
    expected = values * (scales * torch.tensor(0.3)).repeat_interleave(16, dim=1)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    assert torch.equal(dequantized(config, tensors, (16, 64)), expected)


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"])
def test_auto_round(packing: str) -> None:
    n, k = 16, 64
    groups = torch.arange(k) // 32
    codes, zeros, scales = some((n, k), below=16), some((n, 2), below=16), some_scales((n, 2))
    if packing.endswith("awq"):
        tensors: Tensors = stored_awq(codes, zeros, scales)
    else:
        first_format = packing.endswith("auto_gptq")
        stored = stored_gptq(codes, zeros, scales, groups, bits=4, first_format=first_format)
        tensors = {name: tensor for name, tensor in stored.items() if name != "g_idx"}
    other = {"bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    config = {
        "quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32,
        "sym": False, "autoround_version": "0.5", "block_name_to_quantize": "model.layers",
    }  # fmt: skip
    if not packing.endswith("awq"):
        config |= {
            "bits": 8,
            "group_size": -1,
            "extra_config": {NAME: other, "lm_head": {"bits": 16}},
        }
        assert method_of(config, {}).format_of("lm_head") is None
    expected = formula(codes, zeros, scales, groups)
    assert torch.equal(dequantized(config, tensors, (n, k)), expected)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("words", [1, 2, 3, 17])
def test_c_unpacks_as_pytorch_does(bits: int, words: int) -> None:
    stored = some((5, words), below=2**32, seed=bits).sub(2**31).to(torch.int32)
    stream = stored.view(torch.uint8)
    assert torch.equal(unpack(stored, bits), unpack_in_torch(stream, bits))
    if bits == 4:
        assert torch.equal(unpack(stored, bits, awq=True), unpack_awq_in_torch(stored))


# ---- shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", GOLDEN, ids=lambda each: each.kind)
def test_a_shard_is_a_part_of_the_whole(each: Golden) -> None:
    """Also one that begins inside of a word or a block of rows."""
    whole = dequantized(each.config, each.tensors, each.shape)
    rows = each.shape[0]
    for outputs in (range(rows // 2), range(rows // 2, rows), range(3, rows - 2), range(7, 8)):
        part = dequantized(each.config, each.tensors, each.shape, outputs=outputs)
        assert torch.equal(part, whole[outputs.start : outputs.stop]), outputs


# ---- what decides ----------------------------------------------------------------------------------------


def test_tensors_decide_what_is_quantized() -> None:
    """Config lists name layers in many ways, and some tools write none."""
    each = golden("copied.safetensors")[0]
    method = method_of({**each.config, "modules_to_not_convert": []}, {"weight": torch.ones(1)})
    assert method.format_of("model.layers.0.self_attn.k_proj") is None
