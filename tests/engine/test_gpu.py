"""Choosing a device without importing PyTorch."""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
from collections.abc import Callable

import pytest

from quire.config import from_flat
from quire.engine import core_process, gpu, rank, setup
from quire.errors import ConfigError
from quire.runner.footprint import DeviceMemory


@pytest.mark.parametrize(
    ("found", "built", "wanted", "device"),
    [
        (True, True, "auto", "cuda"),
        (True, True, "cuda", "cuda"),
        (True, True, "cpu", "cpu"),
        (True, False, "auto", "cpu"),
        (False, True, "auto", "cpu"),
    ],
)
def test_the_device(
    found: bool, built: bool, wanted: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DeviceMemory(total=80 << 30, available=79 << 30)
    monkeypatch.setattr(gpu, "gpu_memory", lambda: memory if found else None)
    monkeypatch.setattr(gpu, "torch_is_built_for_gpus", lambda: built)
    assert gpu.choose_device(wanted) == device


@pytest.mark.parametrize(
    ("found", "built", "says"), [(False, True, "no NVIDIA driver"), (True, False, "CPU build")]
)
def test_a_gpu_that_cannot_be_had(
    found: bool, built: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpu_memory", lambda: DeviceMemory(1, 1) if found else None)
    monkeypatch.setattr(gpu, "torch_is_built_for_gpus", lambda: built)
    with pytest.raises(ConfigError, match=says):
        gpu.choose_device("cuda")


class Driver:
    """NVML with two GPUs."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return self.code

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: object) -> int:
        handle._obj.value = 100 + index.value  # type: ignore[attr-defined]
        return 0 if index.value < 2 else 6

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: object) -> int:
        handle._obj.value = 101  # type: ignore[attr-defined]
        return 0 if uuid == b"GPU-abc" else 6

    def nvmlDeviceGetCount_v2(self, count: object) -> int:
        count._obj.value = 2  # type: ignore[attr-defined]
        return 0

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p, uuid: object, size: object) -> int:
        uuid.value = b"GPU-abc" if handle.value == 101 else b"GPU-axy"  # type: ignore[attr-defined]
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: object) -> int:
        memory._obj.total, memory._obj.free = handle.value, 7  # type: ignore[attr-defined]
        return 0


@pytest.mark.parametrize(
    ("visible", "total"),
    [
        (None, 100),
        ("0", 100),
        ("1,0", 101),
        ("GPU-abc", 101),
        ("GPU-ab", 101),  # as CUDA: the beginning of one
        ("GPU-a", None),
        ("", None),
        ("-1", None),
        ("5", None),
    ],
)
def test_the_driver_is_asked_for_the_visible_gpu(
    visible: str | None, total: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.gpu_memory() == (None if total is None else DeviceMemory(total, 7))
    assert driver.open == 0


def _no_driver(name: str) -> None:
    raise OSError


@pytest.mark.parametrize("load", [_no_driver, lambda name: Driver(code=9)])
def test_no_driver(load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.gpu_memory() is None


def test_what_torch_was_built_for(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch"  # type: ignore[operator]
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for line, built in (
        ("cuda: Optional[str] = '13.0'", True),
        ("cuda: Optional[str] = None", False),
        ("hip: Optional[str] = '7.1'", True),
    ):
        (package / "version.py").write_text(f"from typing import Optional\n{line}\n")
        assert gpu.torch_is_built_for_gpus() is built
    (package / "version.py").unlink()
    assert gpu.torch_is_built_for_gpus() is False


def test_cuda_and_the_driver_number_the_gpus_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    gpu.order_as_nvml()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    gpu.order_as_nvml()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    sources = [inspect.getsource(main) for main in (core_process.main, rank.run_rank)]
    assert all("order_as_nvml()" in source for source in sources)


@pytest.mark.parametrize(
    ("gib", "given", "found"),
    [
        (141, {}, (64, 512, 8192)),
        (24, {}, (64, 256, 2048)),
        (141, {"max_num_batched_tokens": 300}, (64, 300, 300)),
        (24, {"block_size": 16, "max_num_seqs": 16}, (16, 16, 2048)),
        (141, {"block_size": 16, "max_num_seqs": 128, "max_num_batched_tokens": 2048}, (16, 128, 2048)),
        (None, {}, (16, 128, 2048)),
    ],
)  # fmt: skip
def test_defaults_depend_on_the_device(
    gib: int | None,
    given: dict[str, object],
    found: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = None if gib is None else DeviceMemory(gib << 30, gib << 30)
    monkeypatch.setattr(gpu, "gpu_memory", lambda: memory)
    monkeypatch.setattr(setup, "gpu_memory", lambda: memory)
    monkeypatch.setattr(gpu, "torch_is_built_for_gpus", lambda: True)
    config = setup.locate(from_flat(given))
    options = config.scheduler
    assert (config.cache.block_size, options.max_num_seqs, options.max_num_batched_tokens) == found
    assert setup.locate(config) == config
