"""What a decode step may not do, as counts and bytes: nothing here reads a clock."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from quire.engine.llm import LLM
from quire.kernels.cpu.program import NativeProgram
from quire.sampling_params import SamplingParams

SHORT, LONG = 100, 1900


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(kernels="native", kv_cache_memory_bytes=64 << 20, cpu_threads=1) as llm:
        # What the cost model does, and when the load is computed anew, depends on the time of steps.
        scheduler = llm._core._core.scheduler
        scheduler.costs.observe = lambda work, seconds: None
        scheduler.load._clock = lambda: 0.0
        yield llm


def during_decode_steps(llm: LLM, context: int, step: Callable[[Callable[[], object]], int]) -> int:
    """`step` wraps each of some decode steps at this context; its smallest value: one step in 16 also
    takes a block, and the first after a prompt warms up."""
    core = llm._core._core
    plain, seen = core.step, []

    def wrapped() -> object:
        outputs: list[object] = []
        seen.append(step(lambda: outputs.append(plain())))
        return outputs[0]

    core.step = wrapped
    try:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        llm.generate([[7] * context, [8] * context], params, use_tqdm=False)
    finally:
        core.step = plain
    return min(seen[2:-1])


def test_the_compiled_pass_is_in_use(llm: LLM) -> None:
    assert isinstance(llm._core._core.executor.runner.backend._pass, NativeProgram)


def test_python_work_does_not_grow_with_the_context(llm: LLM) -> None:
    def count_calls(run: Callable[[], object]) -> int:
        calls = 0

        def profiler(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(profiler)
        try:
            run()
        finally:
            sys.setprofile(before)
        return calls

    at_short = during_decode_steps(llm, SHORT, count_calls)
    at_long = during_decode_steps(llm, LONG, count_calls)
    assert at_short == at_long > 0


def test_no_copy_of_the_context(llm: LLM) -> None:
    """A step's memory in Python and NumPy grows by the block table's entry, 4 bytes for 16 tokens; the keys
    and values of one token are 2 KiB."""

    def peak(run: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            run()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    growth = during_decode_steps(llm, LONG, peak) - during_decode_steps(llm, SHORT, peak)
    assert growth < 2 * (LONG - SHORT)
