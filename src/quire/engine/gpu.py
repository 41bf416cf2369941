"""Finds out whether there is a GPU and how much memory it has, without importing PyTorch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from ctypes import byref, c_uint, c_ulonglong, c_void_p
from pathlib import Path

from quire.errors import ConfigError
from quire.runner.footprint import DeviceMemory


def choose_device(wanted: str) -> str:
    """ "cpu" or "cuda" for an option of "auto", "cpu" or "cuda".

    Raises `ConfigError` if a GPU is asked for and there is none, or PyTorch was built without CUDA.
    """
    if wanted == "cpu":
        return "cpu"
    found, built = gpu_memory() is not None, torch_is_built_for_gpus()
    if found and built:
        return "cuda"
    if wanted == "auto":
        return "cpu"
    if not found:
        raise ConfigError(
            "device 'cuda': no NVIDIA driver shows a GPU here (nvidia-smi should list one; "
            "CUDA_VISIBLE_DEVICES may hide it). Use --device cpu."
        )
    raise ConfigError(
        "device 'cuda': the installed PyTorch is a CPU build. Install one for your CUDA version "
        "(https://pytorch.org), or use --device cpu."
    )


def torch_is_built_for_gpus() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^(cuda|hip)\b.*= *'", version, re.MULTILINE) is not None


class _Memory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


def gpu_count() -> int:
    """How many GPUs PyTorch would find here; 0 if it was built without CUDA."""
    if gpu_memory() is None or not torch_is_built_for_gpus():
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return len(visible.split(","))
    count = c_uint()
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        return count.value if nvml.nvmlDeviceGetCount_v2(byref(count)) == 0 else 0
    finally:
        nvml.nvmlShutdown()


def order_as_nvml() -> None:
    """CUDA numbers the GPUs by their speed, NVML by their place on the bus: on a machine with several kinds,
    the memory would be another one's. Call it in a process of our own, before CUDA is used."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def _whole(nvml: ctypes.CDLL, prefix: str) -> str:
    """The UUID that begins like this, which is enough for CUDA; the prefix if there is none, or several."""
    count, found = c_uint(), []
    if nvml.nvmlDeviceGetCount_v2(byref(count)) == 0:
        for index in range(count.value):
            handle, uuid = c_void_p(), ctypes.create_string_buffer(96)
            code = nvml.nvmlDeviceGetHandleByIndex_v2(c_uint(index), byref(handle))
            if code == 0 and nvml.nvmlDeviceGetUUID(handle, uuid, c_uint(len(uuid))) == 0:
                found.append(uuid.value.decode())
    like = [each for each in found if each.startswith(prefix)]
    return like[0] if len(like) == 1 else prefix


def gpu_memory() -> DeviceMemory | None:
    """The memory of the first GPU in CUDA_VISIBLE_DEVICES, from the driver's NVML; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        handle, memory = c_void_p(), _Memory()
        if visible.isdigit():
            code = nvml.nvmlDeviceGetHandleByIndex_v2(c_uint(int(visible)), byref(handle))
        else:
            code = nvml.nvmlDeviceGetHandleByUUID(_whole(nvml, visible).encode(), byref(handle))
        if code != 0 or nvml.nvmlDeviceGetMemoryInfo(handle, byref(memory)) != 0:
            return None
        return DeviceMemory(total=memory.total, available=memory.free)
    finally:
        nvml.nvmlShutdown()
