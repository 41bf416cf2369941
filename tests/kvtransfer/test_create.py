from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quire.config import from_flat
from quire.engine.assemble import parts_of
from quire.engine.setup import locate, resolve
from quire.errors import ConfigError
from quire.kvtransfer.create import create_store
from quire.kvtransfer.disk import DiskTier
from quire.kvtransfer.fingerprint import fingerprint_of
from quire.kvtransfer.mover import Mover
from quire.kvtransfer.ram import RamTier
from quire.runner.footprint import block_bytes
from tests.kvtransfer.memory import Cache, bytes_of, name_of

GIB = 2**30


def store(rank: int = 0, numerics: str = "x", **options: object) -> Mover:
    config = locate(from_flat({"device": "cpu", **options}))
    part = parts_of(config, resolve(config))[rank]
    fingerprint = fingerprint_of(
        config,
        part.model,
        part.directory,
        dtype=part.dtype,
        kv_cache_dtype=part.kv_cache_dtype,
        numerics=numerics,
    )
    return create_store(
        config,
        part.model,
        fingerprint,
        kv_cache_dtype=part.kv_cache_dtype,
        rank=rank,
        memory=Cache(2, block_bytes(config, part)),
    )


def size_of(mover: Mover) -> int:
    return mover._memory.block_bytes


def only_tier(mover: Mover) -> RamTier | DiskTier:
    (tier,) = mover.tiers
    return tier


def test_a_rank_has_its_part_of_the_memory() -> None:
    for options, expected in (
        ({"swap_space": 0.5, "tensor_parallel_size": 2}, GIB // 2),
        ({"kv_offloading_size": 0.5, "tensor_parallel_size": 2}, GIB // 4),
    ):
        mover = store(rank=1, **options)
        assert only_tier(mover).capacity == expected
        mover.close()


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8"}, {"dtype": "float32"}], ids=str)
def test_the_blocks_of_every_kind_of_cache_come_back(options: dict[str, object]) -> None:
    mover = store(swap_space=0.01, **options)
    tier, size = only_tier(mover), size_of(mover)
    data, out = bytes_of(name_of(1), size), np.empty(size, np.uint8)
    assert tier.put(name_of(1), data)
    assert tier.get(name_of(1), out) and np.array_equal(out, data)
    mover.close()


def put(mover: Mover) -> None:
    tier = only_tier(mover)
    assert tier.wait_indexed(10)
    assert tier.put(name_of(1), bytes_of(name_of(1), size_of(mover)))
    mover.close()


def has(mover: Mover) -> bool:
    tier = only_tier(mover)
    assert tier.wait_indexed(10)
    found = tier.get(name_of(1), np.empty(size_of(mover), np.uint8))
    mover.close()
    return found


def test_the_disk_is_the_same_ones_after_a_restart_only(tmp_path: Path) -> None:
    disk = {"kv_disk_path": str(tmp_path / "kv"), "kv_disk_size": 0.05}
    put(store(**disk))
    assert has(store(**disk))
    assert not has(store(numerics="y", **disk))
    assert not has(store(dtype="float32", **disk))
    assert not any(has(store(rank, tensor_parallel_size=2, **disk)) for rank in (0, 1))
    assert not has(store(0, pipeline_parallel_size=2, **disk))
    put(store(1, tensor_parallel_size=2, **disk))
    assert has(store(1, tensor_parallel_size=2, **disk))
    assert not has(store(0, tensor_parallel_size=2, **disk))
    assert has(store(**disk))


def test_memory_is_asked_before_the_disk(tmp_path: Path) -> None:
    disk = {"kv_disk_path": str(tmp_path), "kv_disk_size": 0.05}
    tmp_path.chmod(0o700)
    mover = store(swap_space=0.01, **disk)
    assert [tier.label for tier in mover.tiers] == ["ram", "disk"]
    mover.close()


def test_a_disk_that_cannot_be_used_is_an_error_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="kv-disk-path"):
        store(kv_disk_path=str(file), kv_disk_size=0.05)
