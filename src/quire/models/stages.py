"""How the layers of a model are divided into the stages of a pipeline; torch-free.

A stage takes as long as it has weights: in a step of few tokens they are read, in one of many each token is
multiplied with them. So stages get about equal bytes, the head's included. The embedding does not count: a
step reads one row of it for each token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

from quire.errors import ConfigError
from quire.models.spec import ModelSpec
from quire.weights.source import TensorInfo

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OTHER = re.compile(r"(?:^|\.)(embed_tokens|lm_head|norm)\.[^.]+$")


def staged(
    spec: ModelSpec, stage: int, count: int, *, dtype_bytes: int, partition: str = ""
) -> ModelSpec:
    """One stage of `count`. partition: layers of each stage, like "20,12"; empty: by bytes. Raises
    `ConfigError`."""
    if count == 1:
        return spec
    if count > spec.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size is {count}, but {spec.architecture} has {spec.num_layers} layers, and "
            f"each stage at least one; use at most {spec.num_layers}."
        )
    sizes = _read(partition, spec, count) if partition else divide(costs(spec, dtype_bytes), count)
    first = sum(sizes[:stage])
    return replace(spec, stage=range(first, first + sizes[stage]))


def costs(spec: ModelSpec, dtype_bytes: int) -> list[int]:
    """Bytes of each layer, with the head's in the last one."""
    layers = [
        replace(spec, stage=range(index, index + 1)).weight_bytes(dtype_bytes)
        for index in range(spec.num_layers)
    ]
    embedding = replace(spec, stage=range(0)).weight_bytes(dtype_bytes)
    return [layers[0] - embedding, *layers[1:]] if spec.num_layers > 1 else layers


def divide(costs: list[int], count: int) -> list[int]:
    """Lengths of `count` runs whose largest sum is as small as possible. Of several such divisions, the one
    whose first runs are longest: the last stage also samples."""
    total = list(accumulate(costs, initial=0))
    # tables[runs - 1][end]: of the first `end` costs in so many runs, the largest sum, and minus the start
    # of the last run
    tables = [[(each, 0) for each in total]]
    for runs in range(2, count + 1):
        last = [(total[-1] + 1, 0)] * runs
        for end in range(runs, len(total)):
            last.append(
                min(
                    (max(tables[-1][start][0], total[end] - total[start]), -start)
                    for start in range(runs - 1, end)
                )
            )
        tables.append(last)
    sizes, end = [], len(costs)
    for table in reversed(tables):
        start = -table[end][1]
        sizes.append(end - start)
        end = start
    return sizes[::-1]


def of_stage(tensors: Mapping[str, TensorInfo], spec: ModelSpec) -> Mapping[str, TensorInfo]:
    """Without those that only other stages have, by their names in the file."""
    if spec.stage is None:
        return tensors
    has_embedding = spec.is_first or (spec.is_last and spec.tie_word_embeddings)
    others = {"embed_tokens": has_embedding, "lm_head": spec.has_logits, "norm": spec.is_last}

    def has(name: str) -> bool:
        if (layer := _LAYER.search(name)) is not None:
            return int(layer[1]) in spec.own_layers
        found = _OTHER.search(name)
        return found is None or others[found[1]]

    return {name: info for name, info in tensors.items() if has(name)}


def _read(partition: str, spec: ModelSpec, count: int) -> list[int]:
    try:
        sizes = [int(each) for each in partition.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != count or min(sizes) < 1 or sum(sizes) != spec.num_layers:
        equal = ",".join(map(str, divide([1] * spec.num_layers, count)))
        raise ConfigError(
            f"pipeline_layer_partition (VLLM_PP_LAYER_PARTITION) must be {count} numbers of layers with the "
            f"sum {spec.num_layers}, like {equal}; got {partition!r}."
        )
    return sizes
