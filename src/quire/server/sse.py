"""Server-sent events, written by hand: one bytes object per event, one `send` each.

Starlette's StreamingResponse polls the client in its own task group. It can neither send keep-alive
comments nor report an error once the headers are sent. A library for SSE takes seven times as long per
chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response

from quire.server.errors import ApiError, to_api_error
from quire.server.live import ClientGoneError, LiveRequest, Receive

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(payload: bytes) -> bytes:
    """One event. JSON has no raw newlines, so it always fits in one `data:` line."""
    return b"data: " + payload + b"\n\n"


def named_event(name: str, payload: bytes) -> bytes:
    return b"event: " + name.encode("ascii") + b"\n" + event(payload)


def error_event(error: ApiError) -> bytes:
    return event(msgspec.json.encode({"error": error.payload()}))


@dataclass(frozen=True, slots=True)
class Ending:
    """How a stream ends. The default is that of chat completions."""

    done: bytes = DONE
    on_error: Callable[[ApiError], bytes] = error_event


class EventStream(Response):
    """Sends `events` (whole events, as bytes), then `ending.done`.

    An exception in `events`, or `live.terminate`, becomes an error event before that, since the status
    200 has been sent already. If the client disconnects, `events` ends at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        live: LiveRequest,
        request_id: str,
        keep_alive: float,
        headers: Mapping[str, str] | None = None,
        ending: Ending | None = None,
    ) -> None:
        self.status_code = 200
        self._ending = ending or Ending()
        self.background = None
        self.init_headers(
            {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})}
        )
        self._events = events
        self._live = live
        self._request_id = request_id
        self._keep_alive = keep_alive

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await self._live.run(self._write(send), receive)
        except ClientGoneError:
            pass
        finally:
            self._live.close()
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        writer = _Writer(send)
        await writer.start(self.raw_headers)
        keeper = asyncio.ensure_future(writer.keep_alive(self._keep_alive))
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await writer.write(data)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._live.error is None or task is None:
                raise  # the client has disconnected
            task.uncancel()
            await writer.write(self._ending.on_error(self._live.error))
        except Exception as error:
            await writer.write(self._ending.on_error(to_api_error(error, self._request_id)))
        finally:
            keeper.cancel()
        await writer.finish(self._ending.done)

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """No content-length: the length is not known."""
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            *(
                (name.lower().encode("latin-1"), value.encode("latin-1"))
                for name, value in (headers or {}).items()
            ),
        ]


class _Writer:
    """Serializes writes of the stream and of its keep-alive, and keeps the time of the last one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = asyncio.Lock()
        self._clock = asyncio.get_running_loop().time
        self._last = self._clock()

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes) -> None:
        async with self._lock:
            self._last = self._clock()
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes) -> None:
        async with self._lock:
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def keep_alive(self, interval: float) -> None:
        """A comment after each `interval` seconds without data, so that no proxy closes the connection of a
        request that waits."""
        while interval > 0:
            silent = self._clock() - self._last
            if silent >= interval:
                await self.write(KEEP_ALIVE)
            else:
                await asyncio.sleep(interval - silent)
