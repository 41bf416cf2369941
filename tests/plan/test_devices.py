"""The table of GPUs."""

from __future__ import annotations

import pytest

from quire.errors import ConfigError
from quire.plan.devices import FILE, find_gpu, gpu_names, parse_gpus, sources


def test_figures_are_dense_and_memory_is_what_drivers_report() -> None:
    assert gpu_names() == ["a100", "h100", "h200", "b200", "mi300x", "l40s", "rtx4090"]
    for name in gpu_names():
        gpu = find_gpu(name)
        sold = float(gpu.title.split()[-2]) * 1e9
        assert 0.97 < gpu.memory_bytes / sold < 1.08, "GB and GiB are not the same"
        if gpu.fp8 is not None:
            assert 1.9 < gpu.fp8 / gpu.bf16 < 2.1, "four times would be a sparse figure"
        assert gpu.prices[0] <= gpu.price <= gpu.prices[1]
    assert find_gpu("L40S").fp8 == 733e12
    assert find_gpu("h100").memory_bytes < 80 * 2**30
    assert set(sources()) == {"specification", "memory_mib", "link", "price"}
    assert FILE.name == "devices.json"


@pytest.mark.parametrize(
    ("name", "found"),
    [("H100", "h100"), ("4090", "rtx4090"), ("NVIDIA_A100-80GB", "a100"), ("MI300", "mi300x")],
)
def test_names_and_aliases(name: str, found: str) -> None:
    assert find_gpu(name).name == found


def test_an_unknown_gpu_is_refused_with_names_that_are_near() -> None:
    with pytest.raises(ConfigError, match="'h10' is not in the table of GPUs; try h100"):
        find_gpu("h10")
    with pytest.raises(ConfigError, match="try a100, h100, h200, b200, mi300x, l40s, rtx4090"):
        find_gpu("toaster")


def test_a_price_may_be_given() -> None:
    assert find_gpu("h100", price=1.5).price == 1.5
    for price in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="price must be positive"):
            find_gpu("h100", price=price)


def test_counts() -> None:
    assert parse_gpus("h100:2") == ("h100", 2)
    assert parse_gpus("h100") == ("h100", None)
    for text in ("h100:", "h100:0", "h100:x", "h100:65"):
        with pytest.raises(ConfigError, match="from 1 to 64"):
            parse_gpus(text)
