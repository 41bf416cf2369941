"""Compiled grammars for the engine core, which must never wait for one.

A grammar is compiled beside the steps, in threads that llguidance lets run in parallel with Python (it
gives up the interpreter's lock) and that yield the processor to the kernels' (lowest priority).
Python cannot stop a thread. A grammar that takes forever is found by the front end, in a process that can
be killed (`checker.py`); what gets here has been compiled once, and the time limit is a second net.
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
"""By the clock: it runs when nobody else does."""
NUM_THREADS = 1
"""One takes half a small machine already; grammars take milliseconds, so a queue is short."""


@dataclass(slots=True)
class _Job:
    spec: GrammarSpec
    started: float | None = None
    result: Grammar | GrammarError | None = None
    done: threading.Event = field(default_factory=threading.Event)


class GrammarStore:
    """Grammars by what they say, least recently used out first. Used by one thread, the engine core's."""

    def __init__(
        self,
        make_compiler: Callable[[], GrammarCompiler],
        *,
        max_bytes: int = MAX_STORE_BYTES,
        max_seconds: float = MAX_COMPILE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """make_compiler: called once, with the first grammar: reading a large vocabulary takes a second."""
        self._make_compiler = make_compiler
        self._compiler: GrammarCompiler | None = None
        self._compiler_lock = threading.Lock()
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._clock = clock
        self._jobs: dict[GrammarSpec, _Job] = {}
        self._ready: OrderedDict[GrammarSpec, Grammar | GrammarError] = OrderedDict()
        self.num_bytes = 0
        """Of the grammars kept; at most `max_bytes`, but for one that is larger alone."""
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        self._num_threads = 0
        self._news = threading.Event()

    def prepare(self, spec: GrammarSpec) -> None:
        """See to it that `ready` has an answer some time."""
        if spec in self._jobs or spec in self._ready:
            return
        self._jobs[spec] = job = _Job(spec)
        if self._num_threads < NUM_THREADS:
            self._start_thread()
        self._queue.put(job)

    def ready(self, spec: GrammarSpec) -> Grammar | GrammarError | None:
        """The grammar, or why there is none, or None while it is compiled. Does not wait.

        Compiling starts anew if it has been forgotten meanwhile.
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
        """Until something has been compiled since the last call; at most so long."""
        if self._jobs and self._news.wait(seconds):
            self._news.clear()

    def grammar(self, spec: GrammarSpec) -> Grammar:
        """The grammar, here and now: for a request that `ready` has let pass. It is compiled again, and the
        caller waits, only if it was forgotten since. Raises `GrammarError`."""
        while (found := self.ready(spec)) is None:
            self.wait(0.1)
        if isinstance(found, GrammarError):
            raise found
        return found

    def _take(self, job: _Job) -> None:
        """Make the result of a finished job, or of one that takes too long, the answer."""
        if not job.done.is_set():
            if job.started is None or self._clock() - job.started < self._max_seconds:
                return
            self._start_thread()  # that one may never come back
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
    """Threads started here have room for compiling: see `COMPILE_STACK_BYTES`."""
    before = threading.stack_size(COMPILE_STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


def yield_to_others() -> None:
    """Give this thread only the time that nobody else wants, where threads have such a claim (Linux). At nice
    19 it would still get slices of milliseconds, and a small model's step is shorter than one.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _bytes(spec: GrammarSpec, result: Grammar | GrammarError) -> int:
    return len(spec.text) if isinstance(result, GrammarError) else result.num_bytes
