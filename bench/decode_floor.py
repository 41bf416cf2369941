"""One request, decoding: each part of a step beside a plain read of the same weights.

    python -m bench.decode_floor --models DIR [--model M2] [--steps 200] [--threads 2]

Memory bandwidth of a shared machine changes from minute to minute. So steps of the model and plain reads of
all that its products read take turns, on the same threads. A figure is the median over the steps.

With other work on the machine, run it as `chrt -f 1 python ...`: else a thread that loses its core for some
milliseconds decides the figures.

The floor of a step is the plain read; its fraction is the read's time over the step's. A product's GB/s can
be compared with that of the read. Also printed: what one job of the thread pool costs, and how soon a second
thread begins one.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.step_profile import watch_engine

from quire import LLM, SamplingParams
from quire.kernels.cpu.build import find_compiler
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.linear import CProduct
from quire.kernels.program import Program

PROMPT = 128
PAUSES = (0.0, 20e-6, 100e-6, 1e-3, 5e-3)


def compiled() -> ctypes.CDLL:
    source = Path(__file__).with_name("plain_read.c")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plain_read.so"
        flags = ["-O2", "-march=native", "-Wno-psabi", "-fPIC", "-shared"]
        subprocess.run([*find_compiler(), *flags, str(source), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.seconds_to_start.restype = library.seconds_of_empty_job.restype = ctypes.c_double
    return library


class PlainRead:
    """Reads what the products of a program read."""

    def __init__(self, program: Program, threads: int) -> None:
        self._library = compiled()
        self._run = ctypes.cast(load_library().quire_run, ctypes.c_void_p)
        self._threads = threads
        self.sizes: dict[str, int] = {}
        """Bytes by label."""
        found = []
        for op in program.ops:
            product = op.argument
            if isinstance(product, CProduct) and op.label != "embed":
                size = product.in_features * product.out_features * product.dtype.itemsize
                self.sizes[op.label] = self.sizes.get(op.label, 0) + size
                found.append((product.c_weight.panels, size))
        starts, sizes = zip(*found, strict=True)
        self._ranges = (
            (ctypes.c_void_p * len(found))(*starts),
            (ctypes.c_int64 * len(found))(*sizes),
            ctypes.c_int64(len(found)),
        )

    def seconds(self) -> float:
        start = time.perf_counter()
        self._library.plain_read(self._run, *self._ranges, self._threads)
        return time.perf_counter() - start

    def print_jobs(self) -> None:
        empty = [self._library.seconds_of_empty_job(self._run, 1000) for _ in range(20)]
        print(f"empty job of two units: {statistics.median(empty) * 1e6:.2f} us")
        for pause in PAUSES:
            waits = [
                self._library.seconds_to_start(self._run, ctypes.c_double(pause)) for _ in range(51)
            ]
            print(
                f"a second thread begins, {pause * 1e6:.0f} us after the last job: "
                f"{statistics.median(waits) * 1e6:.2f} us"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--model", default="M2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    llm = LLM(
        str(options.models / options.model),
        kv_cache_memory_bytes=1 << 28,
        max_model_len=PROMPT + options.steps,
        cpu_threads=options.threads,
    )
    core: Any = llm._core._core  # a benchmark may look inside
    decoder = core.executor.runner.backend._pass
    read = PlainRead(decoder._program, options.threads)
    watch = watch_engine(llm)
    steps: list[dict[str, float]] = []
    reads: list[float] = []
    last = [time.perf_counter(), dict(decoder.profile())]

    def schedule_after_read() -> Any:
        """A step begins here: so what is before, from the step before on, belongs to that one."""
        phases = dict(decoder.profile())
        parts = {name: phases[name] - last[1][name] for name in phases} | watch.seconds
        parts["build batch"] = (
            parts.get("build batch", 0.0) - sum(phases.values()) + sum(last[1].values())
        )
        parts["loop"] = time.perf_counter() - last[0] - sum(parts.values())
        steps.append(parts)
        reads.append(read.seconds())
        watch.seconds.clear()
        last[:] = [time.perf_counter(), phases]
        return schedule()

    schedule, core.scheduler.schedule = core.scheduler.schedule, schedule_after_read
    rng = random.Random(0)
    prompt = [
        rng.randrange(5, core.executor.runner.model.spec.vocab_size - 300) for _ in range(PROMPT)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=options.steps, ignore_eos=True)
    llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    steps, reads = steps[8:], reads[8:]  # the prompt, and the first steps
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    total = statistics.median(sum(step.values()) for step in steps)
    floor = statistics.median(reads)
    size = sum(read.sizes.values())
    products = sum(medians[name] for name in read.sizes)
    for name, seconds in medians.items():
        rate = f"{read.sizes[name] / seconds / 1e9:8.1f} GB/s" if name in read.sizes else ""
        print(f"{name:12} {seconds * 1e6:8.0f} us {rate}")
    print(f"{'products':12} {products * 1e6:8.0f} us {size / products / 1e9:8.1f} GB/s")
    print(f"{'step':12} {total * 1e6:8.0f} us {size / total / 1e9:8.1f} GB/s")
    print(f"{'plain read':12} {floor * 1e6:8.0f} us {size / floor / 1e9:8.1f} GB/s")
    print(f"of the floor: products {floor / products:.2f}, step {floor / total:.2f}")
    read.print_jobs()
    llm.close()


if __name__ == "__main__":
    main()
