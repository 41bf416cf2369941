"""Checks grammars for the front end: each is compiled once in a process that can be killed.

Some grammars never finish compiling and cannot be interrupted (an intersection of fifty regexes has
exponentially many states, which no limit of llguidance counts). Others would crash the process. So a
client's grammar is first compiled in a helper process with limits on time and memory. Only a grammar that
passes is sent to the engine.
"""

from __future__ import annotations

import hashlib
import selectors
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from queue import LifoQueue

import msgspec

from quire.decoding import GrammarSpec
from quire.structured.base import GrammarError, Vocabulary

MAX_CHECK_SECONDS = 5.0
"""Limit of processor time for one grammar."""
WALL_SECONDS_PER_SECOND = 6
"""The limit of elapsed time is this many times longer, because the helper has the lowest priority."""
START_SECONDS = 60.0
NUM_PROCESSES = 2
"""Two, so that a bad grammar does not delay all others until its time limit."""
NUM_REMEMBERED = 1024
TOO_LONG = "it takes over {:g} s to compile or to follow; simplify it."
TOO_MUCH = "it takes too much memory to compile; simplify it."


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """A vocabulary in the form that is sent to the helper process."""

    tokens: list[bytes]
    special_ids: list[int]
    vocab_size: int
    eos_token_ids: list[int]


class GrammarChecker:
    """Checks grammars for one vocabulary, from any thread."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        max_seconds: float = MAX_CHECK_SECONDS,
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._max_seconds = max_seconds
        self._idle: LifoQueue[_Helper | None] = LifoQueue()
        for _ in range(NUM_PROCESSES):
            self._idle.put(None)
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, spec: GrammarSpec) -> None:
        """Compile `spec` and follow it for a few tokens. May take some seconds.

        Raises `GrammarError` (an `InvalidParameterError`) with the reason.
        """
        key = hashlib.sha256(f"{spec.kind}:{spec.text}".encode()).digest()
        with self._lock:
            reason = self._known.get(key)
        if reason is None:
            reason = self._try(spec)
            with self._lock:
                self._known[key] = reason
                if len(self._known) > NUM_REMEMBERED:
                    self._known.popitem(last=False)
        if reason:
            raise GrammarError(reason)

    def close(self) -> None:
        """End the helper processes that are idle."""
        idle = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for helper in idle:
            if helper is not None:
                helper.kill()
            self._idle.put(None)

    def _try(self, spec: GrammarSpec) -> str:
        helper = self._idle.get()
        try:
            if helper is None:
                helper = _Helper(self._tokens(), self._max_seconds)
            reason = helper.ask(spec)
            if not helper.is_alive:
                helper = None
            return reason
        finally:
            self._idle.put(helper)

    def _tokens(self) -> Tokens:
        size = min(self._vocabulary.max_token_id + 1, self._vocab_size)
        return Tokens(
            tokens=[self._vocabulary.token_bytes(token) for token in range(size)],
            special_ids=sorted(self._vocabulary.special_ids),
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos,
        )


class _Helper:
    """One helper process; messages have four bytes of length before them."""

    def __init__(self, tokens: Tokens, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._process = subprocess.Popen(
            [sys.executable, "-m", "quire.structured.check_process", str(max_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.is_alive = True
        if self._exchange(msgspec.msgpack.encode(tokens), START_SECONDS) is None:
            self.kill()

    def ask(self, spec: GrammarSpec) -> str:
        """The reason why the grammar is bad; empty if it is good."""
        if not self.is_alive:
            raise GrammarError("the server could not check it; try again.")
        patience = WALL_SECONDS_PER_SECOND * self._max_seconds
        answer = self._exchange(msgspec.msgpack.encode(spec), patience)
        if answer is not None:
            return answer.decode()
        self.kill()
        out_of_time = self._process.returncode in (-signal.SIGPROF, -signal.SIGKILL)
        return TOO_LONG.format(self._max_seconds) if out_of_time else TOO_MUCH

    def kill(self) -> None:
        self.is_alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _exchange(self, message: bytes, seconds: float) -> bytes | None:
        """The answer, or None after the time limit or if the process has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(len(message).to_bytes(4, "little") + message)
            stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(stdout, selectors.EVENT_READ)
                if not selector.select(seconds):
                    return None
            size = stdout.read(4)
            return stdout.read(int.from_bytes(size, "little")) if len(size) == 4 else None
        except (BrokenPipeError, OSError):
            return None
