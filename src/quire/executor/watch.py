"""A thread that reads what ranks send, and notices at once when one ends."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from quire.distributed.links import LinkError
from quire.errors import ConfigError, ModelError, QuireError, WorkerError
from quire.executor.ranks import Rank
from quire.messages import TransferResult
from quire.messages.failures import error_of
from quire.messages.worker import AdapterEnded, LoadsEnded, WorkerFailed, WorkerOutput

logger = logging.getLogger("quire.executor")

T = TypeVar("T", bound=WorkerOutput)


class Watch:
    """The first failure of any rank is the failure of all. on_failure: called once with its text, in the
    thread."""

    def __init__(self, ranks: Sequence[Rank], on_failure: Callable[[str], None]) -> None:
        self._ranks = {rank.link.fileno(): rank for rank in ranks}
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._answers: dict[int, deque[WorkerOutput]] = {rank.number: deque() for rank in ranks}
        self.adapters: deque[tuple[int, AdapterEnded]] = deque()
        """(rank, what it says), until someone takes it."""
        self.loads: deque[tuple[int, TransferResult]] = deque()
        """Likewise."""
        self.error: QuireError | None = None
        self._closing = False
        self._wake = os.eventfd(0)
        self.failed = os.eventfd(0)
        """Readable once there is an error."""
        self._decode = msgspec.msgpack.Decoder(WorkerOutput).decode
        self._thread = threading.Thread(target=self._work, name="rank watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the failure, if there is one."""
        if self.error is not None:
            raise self.error.with_traceback(None)

    def answer(self, rank: Rank, kind: type[T], timeout: float) -> T:
        """The rank's next answer. Raises the failure, or `WorkerError` after `timeout` seconds."""
        answers = self._answers[rank.number]
        with self._changed:
            self._changed.wait_for(lambda: answers or self.error is not None, timeout)
        self.check()
        while answers:
            found = answers.popleft()
            if isinstance(found, kind):
                return found
            logger.error("%s sent a %s out of turn", rank.name, type(found).__name__)
        self.fail(WorkerError(f"{rank.name} is late by {timeout:g} s."))
        self.check()
        raise AssertionError

    def have_answered(self) -> bool:
        """Whether all ranks have an answer that nobody has taken."""
        return all(self._answers.values())

    def wait(self, seconds: float, condition: Callable[[], object]) -> None:
        """Until the condition, which something that a rank sends makes true; at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self.error is not None, seconds)

    def fail(self, error: QuireError) -> None:
        """The first call counts. From any thread."""
        with self._changed:
            if self.error is not None or self._closing:
                return
            self.error = error
            self._changed.notify_all()
        logger.error("%s", error)
        os.eventfd_write(self.failed, 1)
        self._on_failure(str(error))

    def close(self) -> None:
        """Before the ranks are ended. Idempotent."""
        if not self._closing:
            self._closing = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)
            os.close(self.failed)

    # --- in the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for descriptor in self._ranks:
            poller.register(descriptor, select.POLLIN)
        while not self._closing:
            for descriptor, _ in poller.poll():
                if descriptor == self._wake:
                    continue
                rank = self._ranks[descriptor]
                try:
                    while (payload := rank.link.poll()) is not None:
                        self._take(rank, payload)
                except LinkError:
                    poller.unregister(descriptor)
                    self.fail(WorkerError(f"{_capital(rank.name)} {rank.reason()}."))

    def _take(self, rank: Rank, payload: bytes) -> None:
        try:
            message: WorkerOutput = self._decode(payload)
        except msgspec.DecodeError as error:
            logger.error("%s sent what is not of the protocol: %s", rank.name, error)
            return
        if isinstance(message, WorkerFailed):
            self.fail(_error_of(rank, message))
            return
        with self._changed:
            if isinstance(message, AdapterEnded):
                self.adapters.append((rank.number, message))
            elif isinstance(message, LoadsEnded):
                self.loads += [(rank.number, result) for result in message.results]
            else:
                self._answers[rank.number].append(message)
            self._changed.notify_all()


def _error_of(rank: Rank, message: WorkerFailed) -> QuireError:
    error = error_of(message.failure)
    text = message.failure.message
    if isinstance(error, ModelError | ConfigError):  # of the start
        return type(error)(f"{rank.name}: {text}")
    return WorkerError(f"{_capital(rank.name)} failed: {text}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
