"""The helper process of `checker.py`: `python -m quire.structured.check_process`.

Reads a vocabulary, then grammars. Answers each grammar with the reason why it is bad, or with an empty text.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
from queue import SimpleQueue
from typing import BinaryIO

import msgspec
import numpy as np

from quire.decoding import GrammarSpec
from quire.structured.base import GrammarError
from quire.structured.checker import TOO_MUCH, Tokens
from quire.structured.guidance import GuidanceCompiler
from quire.structured.masks import num_mask_words, tokens_of
from quire.structured.store import deep_stacks, yield_to_others

MAX_MEMORY = 4 << 30
"""Limit on the process's address space in bytes, stacks included."""
WALK_TOKENS = 16


class SentVocabulary:
    """A `Vocabulary` without its tokenizer. It encodes a text as one token per byte, which is always
    possible if there is a token for each byte. For a check the choice of tokens does not matter."""

    def __init__(self, sent: Tokens) -> None:
        self._tokens = sent.tokens
        self.special_ids = frozenset(sent.special_ids)
        self.max_token_id = len(sent.tokens) - 1
        self._single = {token: i for i, token in enumerate(sent.tokens) if len(token) == 1}

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raw = text.encode()
        single = [self._single.get(raw[i : i + 1]) for i in range(len(raw))]
        return [token for token in single if token is not None] if None not in single else []


def check(compiler: GuidanceCompiler, spec: GrammarSpec, vocab_size: int) -> str:
    """Compile, and follow the grammar for a few random tokens: some are quick to compile and slow to
    follow."""
    try:
        matcher = compiler.compile(spec).matcher()
    except GrammarError as error:
        return error.reason
    except MemoryError:
        return TOO_MUCH
    row = np.zeros(num_mask_words(vocab_size), np.int32)
    rng = np.random.default_rng(0)
    for _ in range(WALK_TOKENS):
        matcher.fill_mask(row)
        allowed = tokens_of(row)
        if len(allowed) == 0:
            return "it allows no text, or becomes too complex to follow."
        if matcher.is_finished or not matcher.accept(int(rng.choice(allowed))):
            break
    return ""


def main() -> None:
    """Exits when standard input ends, even in the middle of a grammar: then the parent process has ended."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    inbox: SimpleQueue[bytes] = SimpleQueue()
    with deep_stacks():
        threading.Thread(target=_answer, args=(inbox,), daemon=True).start()
    while (message := _read(sys.stdin.buffer)) is not None:
        inbox.put(message)
    os._exit(0)


def _answer(inbox: SimpleQueue[bytes]) -> None:
    yield_to_others()
    sent = msgspec.msgpack.decode(inbox.get(), type=Tokens)
    vocab_size = sent.vocab_size
    try:
        compiler = GuidanceCompiler(
            SentVocabulary(sent), vocab_size=vocab_size, eos_token_ids=sent.eos_token_ids
        )
    except GrammarError as error:
        _write("")
        while inbox.get():
            _write(error.reason)
    _write("")
    max_seconds = float(sys.argv[1])
    while message := inbox.get():
        signal.setitimer(
            signal.ITIMER_PROF, max_seconds
        )  # of processor time; then the system kills the process
        reason = check(compiler, msgspec.msgpack.decode(message, type=GrammarSpec), vocab_size)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _write(reason)


def _read(stream: BinaryIO) -> bytes | None:
    size = stream.read(4)
    return stream.read(int.from_bytes(size, "little")) if len(size) == 4 else None


def _write(text: str) -> None:
    message = text.encode()
    sys.stdout.buffer.write(len(message).to_bytes(4, "little") + message)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
