from __future__ import annotations

import pytest

from quire.config import EngineConfig, from_flat
from quire.errors import ConfigError

GIB = 2**30


def test_off_by_default() -> None:
    config = EngineConfig()
    assert not config.moves_kv and not config.kv_tiers.has_tiers
    assert config.kv_tiers.ram_bytes(1) == config.kv_tiers.disk_bytes == 0
    assert not from_flat({"swap_space": 0, "kv_offloading_size": 0}).moves_kv
    assert not from_flat({"swap_space": None, "kv_offloading_size": None}).moves_kv
    assert not from_flat({"kv_disk_path": "/d", "kv_disk_size": 0}).moves_kv


def test_the_size_of_host_memory_is_of_each_rank_or_of_all() -> None:
    each = from_flat({"swap_space": 0.5, "tensor_parallel_size": 2}).kv_tiers
    together = from_flat({"kv_offloading_size": 3, "tensor_parallel_size": 2}).kv_tiers
    assert each.ram_bytes(2) == GIB // 2 and each.has_tiers
    assert together.ram_bytes(2) == 3 * GIB // 2 and together.has_tiers


def test_the_disk() -> None:
    assert from_flat({"kv_disk_path": "/d"}).kv_tiers.disk_bytes == 16 * GIB
    config = from_flat({"kv_disk_path": "/d", "kv_disk_size": 2})
    assert config.moves_kv and config.kv_tiers.disk_bytes == 2 * GIB


def test_one_failure_policy_counts() -> None:
    exchange = {"kv_connector": "TCPConnector", "kv_role": "kv_both"}
    config = from_flat({"kv_load_failure_policy": "fail", "kv_transfer_config": exchange})
    assert config.kv_load_failure_policy == "fail"
    own = {**exchange, "kv_load_failure_policy": "recompute"}
    config = from_flat({"kv_load_failure_policy": "fail", "kv_transfer_config": own})
    assert config.kv_load_failure_policy == "recompute"
    assert EngineConfig().kv_load_failure_policy == "recompute"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"swap_space": 1, "kv_offloading_size": 1},
            "swap_space .* and kv_offloading_size .* one out",
        ),
        ({"swap_space": -1}, "swap_space is in GiB, from 0 to 1048575, got -1.0"),
        ({"kv_offloading_size": float("nan")}, "kv_offloading_size must be a number or null"),
        ({"swap_space": 4 * 2**30}, "swap_space is in GiB, from 0 to 1048575, got 4294967296"),
        ({"swap_space": float("inf")}, "swap_space is in GiB"),
        ({"kv_disk_size": 1}, "kv_disk_size needs kv_disk_path"),
        ({"kv_disk_path": ""}, "kv_disk_path must not be empty"),
        ({"kv_offloading_backend": "lmcache"}, "kv_offloading_backend must be one of native"),
        ({"kv_write_policy": "never"}, "kv_write_policy must be one of write_back, write_through"),
        (
            {"kv_load_failure_policy": "retry"},
            "kv_load_failure_policy must be one of recompute, fail",
        ),
        (
            {"swap_space": 1, "enable_prefix_caching": False},
            "swap_space and enable_prefix_caching=False",
        ),
        (
            {"kv_disk_path": "/d", "swap_space": 1, "enable_prefix_caching": False},
            "swap_space, kv_disk_path and enable_prefix_caching=False",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_flat(options)
