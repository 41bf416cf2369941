"""Requests in flight: each ends when its work does, when its client leaves, or when the server says so.

Three things can end a request early, and each must reach the engine at once: the client hangs up,
the server drains past its deadline, the engine dies. So the work runs as its own task, raced once
per request (not once per token) against `receive()`; ending it early is cancelling that task.
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
    """The client hung up; nobody reads the answer."""


class LiveRequest:
    """One request in flight. `close()` aborts whatever the engine still does for it."""

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
        """Why the server ended it, if it did."""

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
        """End it with `error`; a stream still gets to say so."""
        if self.error is None:
            self.error = error
            if self._task is not None:
                self._task.cancel()

    def abort(self) -> None:
        """End it where it is: its client gets what there is, with finish_reason "abort"."""
        for stream in self._streams:
            stream.abort()

    def close(self) -> None:
        """The request is over. Idempotent."""
        self.abort()
        self._all_live.discard(self)


class LiveRequests:
    """All of them, so that a drain can wait for the last and cut off the rest."""

    def __init__(self) -> None:
        self._live: set[LiveRequest] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._live)

    def open(
        self, streams: Iterable[RequestStream], *, answer_id: str = "", owner: bytes | None = None
    ) -> LiveRequest:
        """answer_id: what the client is told, by which `owner` (see `middleware.owner_of`) may abort it."""
        request = LiveRequest(self, streams, answer_id=answer_id, owner=owner)
        self._live.add(request)
        self._idle.clear()
        return request

    def discard(self, request: LiveRequest) -> None:
        self._live.discard(request)
        if not self._live:
            self._idle.set()

    def abort(self, ids: Collection[str], owner: bytes | None) -> list[str]:
        """The ids that were there and are ended. Another owner's are as unknown as any."""
        found = [live for live in self._live if live.answer_id in ids and live.owner == owner]
        for live in found:
            live.abort()
        return [live.answer_id for live in found]

    async def wait_idle(self, timeout: float) -> bool:
        """Whether all ended within `timeout` seconds."""
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
    except ApiError:  # it still sends, and too much: it is not waiting for an answer
        pass
