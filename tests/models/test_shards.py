"""n ranks, each with its part of every matrix, give the bits of one device."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from quire.config import EngineConfig
from quire.config.parallel import ParallelConfig
from quire.errors import ConfigError
from quire.kernels.base import Kernels
from quire.kernels.group import Group
from quire.kernels.reference import ReferenceKernels
from quire.kernels.select import create_kernels
from quire.layers.share import Share, can_divide
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.runner.footprint import group_bytes
from quire.weights.safetensors import SafetensorsCheckpoint
from quire.weights.source import TensorInfo, open_source
from tests.models.conftest import Pair
from tests.models.harness import PagedHarness, Request
from tests.models.ranks import Meeting, ThreadGroup, on_each_rank
from tests.models.test_lora import harness as adapted
from tests.models.test_lora import load as load_adapters
from tests.models.variants import SHAPE, VARIANTS, prompt_tokens, save
from tests.weights.adapter_writer import write_adapter

SIZES = (2, 3, 4)
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
}
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


def skip_if_unequal(kernels: Kernels, *, split_groups: bool) -> None:
    if isinstance(kernels, ReferenceKernels) and split_groups:
        pytest.skip("PyTorch's product for one query of a KV head differs from that for several")


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
    skip_if_unequal(kernels, split_groups=size > 3)
    spec = resolve_spec(json.loads((uneven / "config.json").read_text()))
    whole = load_model(spec, open_source(uneven), dtype=dtype, kernels=kernels, max_model_len=256)
    expected = schedule(PagedHarness(whole))
    assert expected.std() > 0.1
    for logits in on_ranks(spec, uneven, size, kernels, dtype):
        assert same_bits(logits, expected)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("llama-mha-tied", 3, {"use_dora": True}),
        ("qwen3-windows-bias", 4, {"embedding": True}),
        ("phi3", 2, {"embedding": True}),
        ("gemma2", 2, {"embedding": True}),
        ("olmo2", 4, {"use_dora": True}),
        ("granite", 2, {"embedding": True}),
    ],
)
def test_adapters(
    name: str, size: int, options: dict[str, bool], pair: Callable[..., Pair], kernels: Kernels,
    checkpoint: Callable[..., tuple[object, Path]], tmp_path: Path,
) -> None:  # fmt: skip
    """Each rank has the rows of B, and the gains, of its outputs. A row without an adapter is beside it."""
    skip_if_unequal(kernels, split_groups=size == 4)
    _, whole = pair(name, kernels)
    targets = ["_proj", "lm_head", *(["embed_tokens"] if "embedding" in options else [])]
    adapter = write_adapter(
        tmp_path, whole.spec, targets, ranks={"up_proj": 5}, use_dora="use_dora" in options
    )

    def batch(model: DecoderModel) -> torch.Tensor:
        table = load_adapters(model, adapter)
        batched = adapted(model, table)
        adapted_row, plain = (
            Request(prompt_tokens(21), adapter=0),
            Request(prompt_tokens(9, seed=3)),
        )
        rows = batched.step([(adapted_row, 13), (plain, 8)])
        rows += batched.step([(plain, 1), (adapted_row, 8)])
        table.close()
        return torch.cat(rows)

    expected = batch(whole)
    source = open_source(checkpoint(name)[1])
    how = {"dtype": torch.float32, "kernels": kernels, "max_model_len": 256}

    @torch.inference_mode()
    def work(group: Group) -> torch.Tensor:
        part = whole.spec.divided(group.rank, group.size)
        return batch(load_model(part, source, group=group, **how))  # type: ignore[arg-type]

    for logits in on_each_rank(size, work):
        assert same_bits(logits, expected)


@pytest.mark.parametrize(("name", "size"), [("llama", 2), ("phi3", 2), ("olmo2-mha-tied", 4)])
def test_a_rank_reads_its_part_of_the_file(
    name: str, size: int, checkpoint: Callable[..., tuple[object, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Norms are read by all ranks: a little in a model of this size, nothing in a large one."""
    _, directory = checkpoint(name)
    spec = resolve_spec(json.loads((directory / "config.json").read_text()))
    read: list[int] = []
    original = SafetensorsCheckpoint.read

    def count(self: SafetensorsCheckpoint, info: TensorInfo, begin: int, into: memoryview) -> None:
        read.append(len(into))
        original(self, info, begin, into)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", count)
    each = []
    for rank in range(size):
        load_model(
            spec.divided(rank, size), open_source(directory), dtype=torch.float32,
            kernels=create_kernels("reference"), max_model_len=64, group=ThreadGroup(rank, Meeting(size)),
        )  # fmt: skip
        each.append(sum(read))
        read.clear()
    file_bytes = (directory / "model.safetensors").stat().st_size
    assert sum(each) <= 1.03 * file_bytes
    assert max(each) <= 1.25 * file_bytes / size


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_random_weights_are_those_of_the_whole(name: str, kernels: Kernels) -> None:
    fields = {**SHAPE, **VARIANTS[name][1]}
    config = VARIANTS[name][0](**fields).to_dict()
    spec = resolve_spec({**config, "architectures": [ARCHITECTURES[name]]})
    options = {"dtype": torch.bfloat16, "kernels": kernels, "max_model_len": 64}
    expected = schedule(PagedHarness(load_model(spec, None, load_format="dummy", **options)))

    @torch.inference_mode()
    def work(group: Group) -> torch.Tensor:
        part = spec.divided(group.rank, group.size)
        model = load_model(part, None, load_format="dummy", group=group, **options)
        return schedule(PagedHarness(model, num_blocks=16))

    for logits in on_each_rank(2, work):
        assert same_bits(logits, expected)


def test_a_part_has_its_share_of_the_memory(uneven: Path) -> None:
    spec = resolve_spec(json.loads((uneven / "config.json").read_text()))
    parts = [spec.divided(rank, 3) for rank in range(3)]
    norms = 2 * (2 * 2 * 72 + 72)
    assert sum(part.weight_bytes(2) - norms for part in parts) == spec.weight_bytes(2) - norms
    assert sum(part.kv_bytes_per_token(2) for part in parts) == spec.kv_bytes_per_token(2)
    assert {part.kv.layer_size for part in parts} == {spec.kv.layer_size // 3}
    assert parts[1].heads == (3, 1, 8)


@pytest.mark.parametrize("name", ["llama", "olmo2", "phi3", "gemma2", "granite"])
def test_the_memory_that_ranks_share_is_foreseen(name: str) -> None:
    """`group_bytes` is before any rank has a program."""
    config = VARIANTS[name][0](**{**SHAPE, **VARIANTS[name][1]}).to_dict()
    spec = resolve_spec({**config, "architectures": [ARCHITECTURES[name]]})
    kernels = create_kernels("reference")
    for size in (2, 4):
        options = EngineConfig(parallel=ParallelConfig(tensor_parallel_size=size))
        tokens, rows = options.scheduler.max_num_batched_tokens, options.max_samples
        foreseen = group_bytes(options, spec, 4)
        model = load_model(
            spec.divided(0, size), None, dtype=torch.float32, kernels=kernels, load_format="dummy",
            max_model_len=64, group=ThreadGroup(0, Meeting(size)),
        )  # fmt: skip
        needed = tokens * model.record().shared_bytes_per_token + 4 * rows * spec.vocab_size
        assert 0.2 * foreseen < needed <= foreseen


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
