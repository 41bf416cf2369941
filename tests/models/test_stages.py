"""Stages of consecutive layers give the bits of one device, alone and each divided among ranks."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import combinations, islice
from operator import sub
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.attention.base import KVCache
from quire.distributed.channel import SharedMemoryChannel, channel_bytes
from quire.distributed.shared_memory import SharedMemoryGroup, create_memory
from quire.errors import ConfigError
from quire.kernels.base import Kernels
from quire.kernels.group import Channels
from quire.kernels.program import StepRows
from quire.models.decoder import DecoderModel
from quire.models.eager_pass import EagerPass, StagePass
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.models.spec import ModelSpec
from quire.models.stages import costs, divide, staged
from quire.weights.source import open_source
from tests.models.test_lora import load as load_adapters
from tests.models.variants import VARIANTS, prompt_tokens
from tests.weights.adapter_writer import write_adapter

BLOCK_SIZE, NUM_BLOCKS = 16, 40
SECONDS = 60.0


def steps(num_groups: int) -> Iterator[StepRows]:
    """Two requests, in chunks, together and alone. All results are wanted, then none, then the last ones."""
    tokens = np.array([prompt_tokens(60, seed=seed) for seed in (1, 2)])
    free = list(range(1, NUM_BLOCKS))
    random.Random(0).shuffle(free)
    tables = np.array(
        [[[free.pop() for _ in range(4)] for _ in tokens] for _ in range(num_groups)],
        dtype=np.int32,
    )
    for rows in (
        [(0, 0, 17, 17)],
        [(0, 17, 1, 1), (1, 0, 22, 0)],
        [(0, 18, 20, 0), (1, 22, 20, 0)],
        [(1, 42, 1, 1), (0, 38, 9, 4)],
    ):
        yield StepRows(tokens, tables, np.array(rows), len(rows), sum(row[3] for row in rows))


def run(
    model: DecoderModel, num_groups: int, *, eager: bool, adapter: Path | None = None
) -> list[torch.Tensor]:
    """The logits of each step. adapter: of the first request."""
    spec = model.spec
    cache = KVCache(
        num_parts=spec.kv.layers_per_page,
        num_blocks=NUM_BLOCKS,
        num_kv_heads=spec.heads.num_kv_heads,
        head_dim=spec.heads.head_dim,
        block_size=BLOCK_SIZE,
        dtype=model.dtype,
    )
    cache.storage.fill_(float("nan"))
    forward = model.over(cache)
    if eager:
        forward = EagerPass(model, cache)
        if spec.stage is not None:
            forward = StagePass(spec, forward, model.channels)
    table = None if adapter is None else load_adapters(model, adapter)
    found = []
    for rows in steps(num_groups):
        if table is not None:
            rows.adapters = np.array([0, -1], dtype=np.int32)
            rows.adapter_set, rows.has_adapters = table.packed, True
        found.append(forward.forward(rows).clone())
    if table is not None:
        table.close()
    return found


def load(
    spec: ModelSpec, directory: Path, kernels: Kernels, dtype: torch.dtype, **ranks: object
) -> DecoderModel:
    return load_model(
        spec, open_source(directory), dtype=dtype, kernels=kernels, max_model_len=256, **ranks
    )


def in_stages(
    stages: Sequence[ModelSpec],
    directory: Path,
    kernels: Kernels,
    *,
    tensor: int = 1,
    dtype: torch.dtype = torch.float32,
    eager: bool = False,
    adapter: Path | None = None,
) -> list[list[torch.Tensor]]:
    """The logits of each rank of the last stage."""
    count, num_groups = len(stages), len(stages[0].kv.groups)
    with ExitStack() as stack:

        def memory(size: int) -> int:
            descriptor = os.memfd_create("test")
            stack.callback(os.close, descriptor)
            os.ftruncate(descriptor, size)
            return descriptor

        between = [
            [memory(channel_bytes(count, 1 << 16)) for _ in range(tensor)] for _ in range(count - 1)
        ]
        groups = [create_memory(16 << 20) for _ in stages]
        stack.callback(lambda: [os.close(each) for each in groups])

        def work(stage: int, rank: int) -> list[torch.Tensor]:
            def end(boundary: int, *, sends: bool) -> SharedMemoryChannel | None:
                if not 0 <= boundary < count - 1:
                    return None
                ring = between[boundary][rank]
                return SharedMemoryChannel(ring, sends=sends, slots=count, timeout=SECONDS)

            channels = Channels(end(stage - 1, sends=False), end(stage, sends=True))
            group, spec = None, stages[stage]
            if tensor > 1:
                group = SharedMemoryGroup(groups[stage], rank=rank, size=tensor, timeout=SECONDS)
                spec = spec.divided(rank, tensor)
            try:
                model = load(spec, directory, kernels, dtype, group=group, channels=channels)
                return run(model, num_groups, eager=eager, adapter=adapter)
            except BaseException as error:
                for each in (group, channels.inlet, channels.outlet):
                    if each is not None:
                        each.abort(f"{error!r}")
                raise
            finally:
                for each in (group, channels.inlet, channels.outlet):
                    if each is not None:
                        each.close()

        places = [(stage, rank) for stage in range(count) for rank in range(tensor)]
        with ThreadPoolExecutor(len(places)) as pool:
            running = [pool.submit(work, *place) for place in places]
        return [each.result() for each in running][-tensor:]


def equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(ours, theirs, strict=True)
    )


Checkpoint = Callable[..., tuple[object, Path]]


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_have_the_bits_of_one_device(
    name: str, checkpoint: Checkpoint, kernels: Kernels
) -> None:
    directory = checkpoint(name)[1]
    spec = resolve_spec(json.loads((directory / "config.json").read_text()))
    expected = run(load(spec, directory, kernels, torch.float32), len(spec.kv.groups), eager=False)
    for count in range(2, min(3, spec.num_layers) + 1):
        stages = [staged(spec, stage, count, dtype_bytes=4) for stage in range(count)]
        for eager in (False, True):
            for logits in in_stages(stages, directory, kernels, eager=eager):
                assert equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stages_of_ranks(dtype: torch.dtype, checkpoint: Checkpoint, kernels: Kernels) -> None:
    directory = checkpoint("gemma3")[1]
    spec = resolve_spec(json.loads((directory / "config.json").read_text()))
    expected = run(load(spec, directory, kernels, dtype), len(spec.kv.groups), eager=False)
    stages = [staged(spec, stage, 2, dtype_bytes=4) for stage in range(2)]
    for logits in in_stages(stages, directory, kernels, tensor=2, dtype=dtype):
        assert equal(logits, expected)


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "phi3"])
def test_each_stage_has_its_part_of_an_adapter(
    name: str, dora: bool, checkpoint: Checkpoint, kernels: Kernels, tmp_path: Path
) -> None:
    """With the embedding on the first, the head on the last."""
    directory = checkpoint(name)[1]
    spec = resolve_spec(json.loads((directory / "config.json").read_text()))
    ends = ["_proj", "lm_head"] + ["embed_tokens"] * (not dora)
    adapter = write_adapter(tmp_path, spec, ends, use_dora=dora)
    whole = load(spec, directory, kernels, torch.float32)
    expected = run(whole, len(spec.kv.groups), eager=False, adapter=adapter)
    assert not equal(expected, run(whole, len(spec.kv.groups), eager=False))
    stages = [staged(spec, stage, 2, dtype_bytes=4) for stage in range(2)]
    for tensor, eager in ((1, False), (1, True), (2, False)):
        for logits in in_stages(
            stages, directory, kernels, tensor=tensor, eager=eager, adapter=adapter
        ):
            assert equal(logits, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_largest_stage_is_as_small_as_it_can_be(count: int) -> None:
    chance = random.Random(count)
    for _ in range(100):
        each = [chance.randrange(1, 9) for _ in range(chance.randrange(count, 9))]
        sizes = divide(each, count)
        assert len(sizes) == count and sum(sizes) == len(each) and min(sizes) > 0
        assert largest(each, sizes) == min(
            largest(each, list(map(sub, (*cuts, len(each)), (0, *cuts))))
            for cuts in combinations(range(1, len(each)), count - 1)
        )


def largest(each: list[int], sizes: list[int]) -> int:
    parts = iter(each)
    return max(sum(islice(parts, size)) for size in sizes)


def llama(num_layers: int, **fields: object) -> ModelSpec:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": num_layers,
        "vocab_size": 1000, "max_position_embeddings": 256, **fields,
    }  # fmt: skip
    return resolve_spec(config)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_counts_and_the_embedding_does_not(tied: bool) -> None:
    spec = llama(8, tie_word_embeddings=tied)
    *layers, last = costs(spec, 2)
    assert len(set(layers)) == 1 and last == layers[0] + (1000 + 1) * 64 * 2
    stages = [staged(spec, stage, 2, dtype_bytes=2) for stage in range(2)]
    assert [len(stage.own_layers) for stage in stages] == [5, 3]
    held = sum(stage.weight_bytes(2) for stage in stages)
    assert held == spec.weight_bytes(2) + (1000 * 64 * 2 if tied else 0)
    assert sum(stage.kv_bytes_per_token(2) for stage in stages) == spec.kv_bytes_per_token(2)


def test_a_partition_of_ones_own() -> None:
    spec = llama(6)
    stages = [staged(spec, stage, 3, dtype_bytes=2, partition="1,4,1") for stage in range(3)]
    assert [stage.own_layers for stage in stages] == [range(1), range(1, 5), range(5, 6)]
    for wrong in ("3,3", "1,4,2", "0,5,1", "a,b,c", "1,4,1,"):
        with pytest.raises(
            ConfigError, match=r"3 numbers of layers with the sum 6, like 2,2,2; got"
        ):
            staged(spec, 0, 3, dtype_bytes=2, partition=wrong)
    with pytest.raises(ConfigError, match=r"is 7, but LlamaForCausalLM has 6 layers.* at most 6"):
        staged(spec, 0, 7, dtype_bytes=2)


def test_a_stage_reads_its_own_layers(checkpoint: Checkpoint, kernels: Kernels) -> None:
    directory = checkpoint("gemma3-untied-pattern")[1]
    spec = resolve_spec(json.loads((directory / "config.json").read_text()))
    names = [
        {target.name for target in load(spec, directory, kernels, torch.float32).targets()}
        for spec in (spec, *(staged(spec, stage, 2, dtype_bytes=4) for stage in range(2)))
    ]
    whole, *stages = names
    assert set.union(*stages) == whole and sum(map(len, stages)) == len(whole)
    assert "model.embed_tokens.weight" in stages[0]
    assert {"model.norm.weight", "lm_head.weight"} <= stages[1]
