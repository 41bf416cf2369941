"""Compiled grammars for the engine core, which must never wait for one.

A grammar is compiled in a thread while steps run: llguidance releases the interpreter's lock, and the
thread has the lowest priority, so that the kernels' threads get the processor first. Python cannot stop a
thread. So a grammar that takes forever must be found by the front end, in a process that can be killed
(`checker.py`). A grammar that reaches the core has been compiled once; the time limit here is only a
second guard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

from quire.decoding import GrammarSpec
from quire.structured.base import COMPILE_STACK_BYTES, Grammar, GrammarCompiler, GrammarError

logger = logging.getLogger(__name__)

MAX_STORE_BYTES = 256 << 20
MAX_COMPILE_SECONDS = 60.0
"""Limit of elapsed time, long because the thread has the lowest priority."""
NUM_THREADS = 1
"""One thread is half of a small machine already. Grammars take milliseconds, so the queue is short."""


@dataclass(slots=True)
class _Job:
    spec: GrammarSpec
    started: float | None = None
    result: Grammar | GrammarError | None = None
    done: threading.Event = field(default_factory=threading.Event)


class GrammarStore:
    """An LRU cache of grammars by their text. Used by one thread, the engine core's."""

    def __init__(
        self,
        make_compiler: Callable[[], GrammarCompiler],
        *,
        max_bytes: int = MAX_STORE_BYTES,
        max_seconds: float = MAX_COMPILE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """make_compiler: called once, for the first grammar, because reading a large vocabulary takes a
        second."""
        self._make_compiler = make_compiler
        self._compiler: GrammarCompiler | None = None
        self._compiler_lock = threading.Lock()
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._clock = clock
        self._jobs: dict[GrammarSpec, _Job] = {}
        self._ready: OrderedDict[GrammarSpec, Grammar | GrammarError] = OrderedDict()
        self.num_bytes = 0
        """Memory of the grammars kept; at most `max_bytes`, except for a single one that is larger."""
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        self._num_threads = 0
        self._news = threading.Event()

    def prepare(self, spec: GrammarSpec) -> None:
        """Begin to compile the grammar, unless it is known."""
        if spec in self._jobs or spec in self._ready:
            return
        self._jobs[spec] = job = _Job(spec)
        if self._num_threads < NUM_THREADS:
            self._start_thread()
        self._queue.put(job)

    def ready(self, spec: GrammarSpec) -> Grammar | GrammarError | None:
        """The grammar, or the error, or None while it is being compiled. Does not wait.

        If the cache has dropped the grammar, compiling starts again.
        """
        job = self._jobs.get(spec)
        if job is not None:
            self._take(job)
        if spec in self._ready:
            self._ready.move_to_end(spec)
            return self._ready[spec]
        self.prepare(spec)
        return None

    def wait(self, seconds: float) -> None:
        """Wait until a grammar has been compiled since the last call; at most `seconds`."""
        if self._jobs and self._news.wait(seconds):
            self._news.clear()

    def grammar(self, spec: GrammarSpec) -> Grammar:
        """The grammar, at once, for a request for which `ready` had it. The caller waits for compiling
        only if the cache has dropped it since. Raises `GrammarError`."""
        while (found := self.ready(spec)) is None:
            self.wait(0.1)
        if isinstance(found, GrammarError):
            raise found
        return found

    def _take(self, job: _Job) -> None:
        """Store the result of a job that has finished or that has taken too long."""
        if not job.done.is_set():
            if job.started is None or self._clock() - job.started < self._max_seconds:
                return
            self._start_thread()  # the old thread may never finish
            job.result = GrammarError(f"it takes over {self._max_seconds:g} s to compile.")
        assert job.result is not None
        del self._jobs[job.spec]
        self._ready[job.spec] = job.result
        self.num_bytes += _bytes(job.spec, job.result)
        while self.num_bytes > self._max_bytes and len(self._ready) > 1:
            self.num_bytes -= _bytes(*self._ready.popitem(last=False))

    def _start_thread(self) -> None:
        self._num_threads += 1
        with deep_stacks():
            threading.Thread(target=self._work, name="grammars", daemon=True).start()

    def _work(self) -> None:
        yield_to_others()
        while True:
            job = self._queue.get()
            job.started = self._clock()
            result = self._compile(job.spec)
            if job.result is None:
                job.result = result
            job.done.set()
            self._news.set()

    def _compile(self, spec: GrammarSpec) -> Grammar | GrammarError:
        try:
            with self._compiler_lock:
                if self._compiler is None:
                    self._compiler = self._make_compiler()
                compiler = self._compiler
            return compiler.compile(spec)
        except GrammarError as error:
            return error
        except Exception:
            logger.exception("compiling a grammar failed")
            return GrammarError("it could not be compiled.")


@contextlib.contextmanager
def deep_stacks() -> Iterator[None]:
    """Threads that are started inside have a stack for compiling: see `COMPILE_STACK_BYTES`."""
    before = threading.stack_size(COMPILE_STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


def yield_to_others() -> None:
    """Let this thread run only when the processor is otherwise idle (SCHED_IDLE, Linux only). With nice
    19 it would still get time slices of milliseconds, and a small model's step is shorter than one.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _bytes(spec: GrammarSpec, result: Grammar | GrammarError) -> int:
    return len(spec.text) if isinstance(result, GrammarError) else result.num_bytes
