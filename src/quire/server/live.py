"""Requests in flight: each ends with its work, when its client disconnects, or when the server ends it.

Three events can end a request early, and each must reach the engine at once: the client disconnects, a
drain reaches its deadline, the engine dies. So the work runs as its own task beside one that waits for
the client's disconnect (one task per request, not per token). To end a request early, its task is
cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, MutableMapping
from typing import Any, TypeVar

from quire.server.engine_protocol import RequestStream
from quire.server.errors import ApiError

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGoneError(Exception):
    """The client has disconnected."""


class LiveRequest:
    """One request in flight. `close()` aborts what is left of it in the engine."""

    def __init__(
        self,
        all_live: LiveRequests,
        streams: Iterable[RequestStream],
        *,
        answer_id: str,
        owner: bytes | None,
    ) -> None:
        self.answer_id = answer_id
        self.owner = owner
        self._all_live = all_live
        self._streams = tuple(streams)
        self._task: asyncio.Task[Any] | None = None
        self.error: ApiError | None = None
        """The error with which the server ended it, if it did."""

    async def run(self, work: Coroutine[Any, Any, T], receive: Receive) -> T:
        """The result of `work`. Raises `ClientGoneError`, or the error given to `terminate`.

        The request's body must have been read: the next message is the disconnect.
        """
        if self.error is not None:
            work.close()
            raise self.error
        task = self._task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        if not task.cancelled():
            return task.result()
        raise self.error or ClientGoneError()

    def terminate(self, error: ApiError) -> None:
        """End it with `error`; a stream still sends the error event."""
        if self.error is None:
            self.error = error
            if self._task is not None:
                self._task.cancel()

    def abort(self) -> None:
        """End it now: its client gets the output so far, with finish_reason "abort"."""
        for stream in self._streams:
            stream.abort()

    def close(self) -> None:
        """The request is over. Idempotent."""
        self.abort()
        self._all_live.discard(self)


class LiveRequests:
    """All requests in flight, so that a drain can wait for them and end those that remain."""

    def __init__(self) -> None:
        self._live: set[LiveRequest] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._live)

    def open(
        self, streams: Iterable[RequestStream], *, answer_id: str = "", owner: bytes | None = None
    ) -> LiveRequest:
        """answer_id: the id in the answer, with which its `owner` (see `middleware.owner_of`) may abort
        it."""
        request = LiveRequest(self, streams, answer_id=answer_id, owner=owner)
        self._live.add(request)
        self._idle.clear()
        return request

    def discard(self, request: LiveRequest) -> None:
        self._live.discard(request)
        if not self._live:
            self._idle.set()

    def abort(
        self, ids: Collection[str], owner: bytes | None, *, of_all: bool = False
    ) -> list[str]:
        """Abort requests; returns the ids that were found. Requests of another owner are not found, except
        with `of_all`."""
        found = [
            live for live in self._live if live.answer_id in ids and (of_all or live.owner == owner)
        ]
        for live in found:
            live.abort()
        return [live.answer_id for live in found]

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until all have ended. Returns whether they did within `timeout` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return not self._live
        return True

    def terminate_all(self, error: ApiError) -> None:
        for request in list(self._live):
            request.terminate(error)


async def _disconnected(receive: Receive) -> None:
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except ApiError:  # it sends more than the limit: treat it as disconnected
        pass
