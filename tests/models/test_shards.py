"""n ranks, each with its part of every matrix, give the bits of one device."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from quire.errors import ConfigError
from quire.kernels.base import Kernels
from quire.kernels.group import Group
from quire.kernels.reference import ReferenceKernels
from quire.layers.share import Share, can_divide
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.weights.source import open_source
from tests.models.conftest import Pair
from tests.models.harness import PagedHarness, Request
from tests.models.ranks import on_each_rank
from tests.models.variants import VARIANTS, prompt_tokens, save

SIZES = (2, 3, 4)
UNEVEN = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}


def schedule(harness: PagedHarness) -> torch.Tensor:
    """Logits of two requests, in chunks, together and alone."""
    first, second = Request(prompt_tokens(41, seed=1)), Request(prompt_tokens(23, seed=2))
    rows = harness.step([(first, 17)])
    rows += harness.step([(first, 1), (second, 22)])
    rows += harness.step([(second, 1), (first, 23)])
    return torch.cat(rows)


def divided(spec: ModelSpec, size: int) -> bool:
    try:
        spec.divided(0, size)
    except ConfigError:
        return False
    return True


def on_ranks(
    spec: ModelSpec,
    directory: Path,
    size: int,
    kernels: Kernels,
    dtype: torch.dtype = torch.float32,
    *,
    share_memory: bool = True,
) -> Sequence[torch.Tensor]:
    """The logits on each rank, of the pass operation by operation; `PagedHarness` compares those of a
    recorded program with them."""

    @torch.inference_mode()
    def work(group: Group) -> torch.Tensor:
        model = load_model(
            spec.divided(group.rank, size),
            open_source(directory),
            dtype=dtype,
            kernels=kernels,
            max_model_len=256,
            group=group,
        )
        return schedule(PagedHarness(model, num_blocks=16))

    return on_each_rank(size, work, share_memory=share_memory)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_have_the_bits_of_one_device(
    name: str, pair: Callable[..., Pair], checkpoint: Callable[..., tuple[object, Path]], kernels: Kernels
) -> None:  # fmt: skip
    _, whole = pair(name, kernels)
    expected = schedule(PagedHarness(whole))
    sizes = [size for size in SIZES if divided(whole.spec, size)]
    assert sizes == ([2, 3, 4] if "mha" in name else [2, 4])  # 2 KV heads on 3 ranks: no
    for size in sizes:
        for logits in on_ranks(whole.spec, checkpoint(name)[1], size, kernels):
            assert same_bits(logits, expected), size


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("name", ["llama-mha-tied", "gemma2", "olmo2", "phi3"])
def test_without_shared_memory(
    name: str, pair: Callable[..., Pair], checkpoint: Callable[..., tuple[object, Path]], kernels: Kernels
) -> None:  # fmt: skip
    """As over gloo: C calls the group."""
    _, whole = pair(name, kernels)
    expected = schedule(PagedHarness(whole))
    for logits in on_ranks(whole.spec, checkpoint(name)[1], 2, kernels, share_memory=False):
        assert same_bits(logits, expected)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 query heads and 3 KV heads, as SmolLM2-135M; sizes that nothing divides."""
    fields = {
        **UNEVEN, "vocab_size": 199, "intermediate_size": 100, "num_hidden_layers": 2,
        "max_position_embeddings": 256, "initializer_range": 0.15, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    return save(model, tmp_path_factory.mktemp("uneven"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 6, 9])
def test_uneven_heads(size: int, dtype: torch.dtype, uneven: Path, kernels: Kernels) -> None:
    if isinstance(kernels, ReferenceKernels) and size > 3:
        pytest.skip("PyTorch's product for one query of a KV head differs from that for three")
    spec = resolve_spec(json.loads((uneven / "config.json").read_text()))
    whole = load_model(spec, open_source(uneven), dtype=dtype, kernels=kernels, max_model_len=256)
    expected = schedule(PagedHarness(whole))
    assert expected.std() > 0.1
    for logits in on_ranks(spec, uneven, size, kernels, dtype):
        assert same_bits(logits, expected)


def test_a_size_that_cannot_be_is_one_error(uneven: Path) -> None:
    spec = resolve_spec(json.loads((uneven / "config.json").read_text()))
    with pytest.raises(ConfigError, match=r"size is 4, but Llama.* 9 query.* 1, 2, 3, 6, 9;"):
        spec.divided(0, 4)  # fmt: skip


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 63, 64, 65, 199, 512, 576, 1000, 128_256])
def test_columns_of_all_ranks_are_the_whole(count: int, size: int) -> None:
    runs = [Share(rank, size).columns(count) for rank in range(size)]
    assert [i for run in runs for i in run] == list(range(count))
    assert Share(0, size).starts(count) == tuple(run.start for run in runs)
    if count >= 64 * size:
        assert all(run.start % 64 == 0 for run in runs)
        assert max(map(len, runs)) - min(map(len, runs)) <= 127
    if count >= size:
        assert all(runs)


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (9, 3), (32, 8), (28, 4), (8, 1), (6, 2)])
def test_heads_of_all_ranks_are_the_whole(heads: int, kv: int) -> None:
    group = heads // kv
    for size in range(1, heads + 2):
        if not can_divide(heads, kv, size):
            continue
        parts = [Share(rank, size) for rank in range(size)]
        queries = [part.q_heads(heads, kv) for part in parts]
        assert [i for run in queries for i in run] == list(range(heads))
        assert all(queries)
        for part, run in zip(parts, queries, strict=True):
            own = part.kv_heads(kv)
            assert {head // group for head in run} == set(own)
            assert len(run) % len(own) == 0  # each KV head has as many query heads
        given = [i for part in parts for i in part.k_columns(kv, 16)]
        assert given == list(range(kv * 16))
