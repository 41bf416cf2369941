"""Kernels without a GPU: run in Triton's interpreter, or compiled to what the GPU would run.

The interpreter (`TRITON_INTERPRET=1`) computes values on the CPU; `fix_interpreter` makes them those of
a GPU. It shows no race, no misaligned and no stray access. `compile_launches` lets a launch function
run up to the machine code, and reads registers, spills and tensor-core instructions out of it; nothing
is executed. `TRITON_INTERPRET` is read when `@triton.jit` decorates, so a process does one or the other.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

ARCHES = (80, 90, 100)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
SHARED_LIMIT = {arch: kib * 1024 for arch, kib in SHARED_LIMIT.items()}
"""Bytes of shared memory that one program may use (CUDA programming guide, compute capabilities; AMD's CDNA3
instruction set reference)."""

# --- the interpreter --------------------------------------------------------------------------------


def fix_interpreter() -> None:
    """Mend four things in which the interpreter of Triton 3.6 differs from a GPU. Call it once.

    A bfloat16 operand of `tl.dot` is multiplied as the integer that holds its bits. A cast to
    bfloat16 or fp8 truncates, and fp8 does not saturate. A tensor as the bound of `range` raises on
    NumPy >= 2.4. Last, `tl.dot` sums in float64 here: NumPy's float32 product may round a row
    differently depending on where it stands in the tile, which tensor cores do not.

    And one for speed: each launch, and each call of a function from a kernel, would look through Triton's
    whole language for what to replace. It is replaced once, and stays so.
    """
    import numpy as np
    from triton.runtime import interpreter

    floats = {
        tl.float64: torch.float64,
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    truncating = interpreter._ir.ROUNDING_MODE.RTZ
    stock_convert = interpreter._convert_float
    stock_dot = interpreter.InterpreterBuilder.create_dot
    stock_patch = interpreter._patch_lang_tensor

    def as_torch(data: Any, dtype: torch.dtype) -> torch.Tensor:
        bits = np.ascontiguousarray(data).view(f"u{dtype.itemsize}")
        return torch.from_numpy(bits.copy()).view(dtype)

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source not in floats or target not in floats or rounding == truncating:
            return stock_convert(data, source, target, rounding)
        values, dtype = as_torch(data, floats[source]), floats[target]
        if dtype.itemsize == 1:
            limit = torch.finfo(dtype).max
            values = values.float().clamp(-limit, limit)  # clamp keeps NaN
        return values.to(dtype).view(unsigned[dtype.itemsize]).numpy().reshape(np.shape(data))

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar not in floats:
            return stock_dot(self, a, b, d, *options)
        left, right = (as_torch(x.data, floats[x.dtype.scalar]).double().numpy() for x in (a, b))
        total = (left @ right + d.data).astype(d.data.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    def patch(tensor: Any, *scope: Any) -> None:
        stock_patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch
    for module in ({"tl": tl}, {"core": tl.core}):
        interpreter._patch_lang(FunctionType((lambda: None).__code__, module))
    nothing_to_restore = interpreter._LangPatchScope
    interpreter._patch_lang = lambda function: nothing_to_restore()


# --- ahead-of-time compiles -------------------------------------------------------------------------


class CompileFailed(Exception):
    """The launch function raised, or the compiler died; the message is the child's traceback."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one launched kernel compiled to."""

    kernel: str
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers, and arrays that no register could hold
    shared: int  # bytes a program
    warps: int
    wgmma: int  # Hopper's asynchronous matrix instructions (HGMMA, QGMMA, IGMMA)
    mma: int  # warp-level matrix instructions (HMMA, QMMA, IMMA)
    tcgen05: int  # Blackwell's matrix instructions (UTCxMMA)
    tma: int  # loads by the bulk tensor copy engine (UTMALDG)
    cp_async: int  # asynchronous copies to shared memory (LDGSTS)
    loop: int  # instructions of the shortest loop that loads asynchronously
    byte_loads: int  # loads of single bytes from shared memory (LDS.U8)
    serialized_wgmma: bool  # ptxas warned that it makes wgmma synchronous: a slow kernel

    def assert_fits(self, arch: int, *, stack: int = 0) -> None:
        """No spills but for so many bytes, and within a multiprocessor's shared memory and registers."""
        assert self.stack <= stack, f"{self} spills"
        assert self.shared <= SHARED_LIMIT[arch], f"{self} needs too much shared memory"
        assert self.registers * self.warps * 32 <= 65536, f"{self} needs too many registers"
        assert not self.serialized_wgmma, f"{self} runs its wgmma one by one"


def shared_memory(launch: Callable[[], object], arch: int | str) -> list[tuple[str, int]]:
    """Each launched kernel's, on a device of whose code nothing else can be looked at: "gfx942", say."""
    return _in_child(lambda: [(k.metadata.name, k.metadata.shared) for k in _compile(launch, arch)])


def variants(launch: Callable[[], object], arch: int = 90) -> list[str]:
    """The kernels that `launch` would compile, each as often as it would; none is."""

    def asked() -> list[str]:
        found: dict[str, str] = {}

        def hook(*, key: str, fn: Any, **_: Any) -> bool:
            found[f"{fn.name} {key}"] = fn.name
            return True

        triton.knobs.runtime.jit_cache_hook = hook
        _compile(launch, arch)
        return sorted(found.values())

    return _in_child(asked)


def compile_launches(launch: Callable[[], object], *, arch: int = 90) -> list[Report]:
    """Run `launch` with every kernel compiled for sm_<arch> and none executed; a report for each.

    `launch` sees Triton as on a machine with such a GPU. Give it tensors on "meta": all that a launch
    looks at is there, and no memory is taken. It runs in a forked child, for an assertion in the
    compiler aborts the process. Kernels launched twice alike are reported twice. Raises
    `CompileFailed`.
    """
    return _in_child(
        lambda: [_report(kernel, seen) for seen in [{}] for kernel in _compile(launch, arch)]
    )


def _in_child(work: Callable[[], Any]) -> Any:
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's idle threads
        child = os.fork()
    if child == 0:
        os.close(read)
        outcome: Any
        try:
            outcome = work()
        except BaseException:
            outcome = traceback.format_exc()
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(outcome, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise CompileFailed(f"the compiler died of signal {os.WTERMSIG(status)}")
    received = pickle.loads(sent)  # noqa: S301 (from our own child)
    if isinstance(received, str):
        raise CompileFailed(received)
    return received


class _AbsentGPU(DriverBase):  # type: ignore[misc]
    """A driver that names a GPU and has none."""

    def __init__(self, arch: int | str) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.arch, str):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10) if isinstance(self.arch, int) else (9, 4)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        raise NotImplementedError("nothing is timed without a GPU")


def _compile(launch: Callable[[], object], arch: int | str) -> list[Any]:
    """In the child, which ends afterwards: nothing here is undone."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(_AbsentGPU(arch))
    launch()
    return compiled


def _report(kernel: Any, seen: dict[str, Report]) -> Report:
    if kernel.hash not in seen:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(kernel.asm["cubin"])
            usage = _output(tools / "cuobjdump", "--dump-resource-usage", binary)
            sass = _output(tools / "nvdisasm", "-c", binary)
            log = ""
            if "wgmma" in kernel.asm["ptx"]:  # Triton keeps no log of ptxas
                source = Path(folder) / "kernel.ptx"
                source.write_text(kernel.asm["ptx"])
                log = _output(tools / "ptxas", "--gpu-name=sm_90a", source, "-o", binary)

        def resource(name: str) -> int:
            found = re.search(rf"\b{name}:(\d+)", usage)
            assert found, f"cuobjdump names no {name}:\n{usage}"
            return int(found[1])

        def count(pattern: str) -> int:
            return len(re.findall(rf"\b({pattern})\b", sass))

        seen[kernel.hash] = Report(
            kernel=kernel.metadata.name,
            registers=resource("REG"),
            stack=resource("STACK") + resource("LOCAL"),
            shared=kernel.metadata.shared,
            warps=kernel.metadata.num_warps,
            wgmma=count("[HQI]GMMA"),
            mma=count("[HQI]MMA"),
            tcgen05=count("UTC[A-Z]*MMA"),
            tma=count("UTMALDG"),
            cp_async=count("LDGSTS"),
            loop=_shortest_loop(sass),
            byte_loads=count("LDS.U8"),
            serialized_wgmma="serialized" in log,
        )
    return seen[kernel.hash]


def _shortest_loop(sass: str) -> int:
    """The fewest instructions of an innermost loop that loads asynchronously: over keys, unmasked."""
    found, labels, lines = [0], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(lines)
        elif "/*" in line and ";" in line:
            lines.append(line)
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                body = lines[labels[back[1]] :]
                inner = any("BRA" in each for each in body[:-1])
                if not inner and any("LDGSTS" in each for each in body):
                    found.append(len(body))
    return min(found[1:], default=0)


def _output(*command: object) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
