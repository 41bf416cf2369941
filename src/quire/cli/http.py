"""The client of `quire chat --url` and `quire demo`: answers of one server, or its refusal as an error."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from quire.errors import ConfigError
from quire.server.upstream import Answer, HttpError, exchange
from quire.util.sse import SseParser


@dataclass(frozen=True, slots=True)
class HttpClient:
    """Requests to one server. Each has its own connection: they are few and long."""

    url: str
    api_key: str | None = None

    async def get(self, path: str) -> bytes:
        """The body of a 2xx answer; otherwise `HttpError`."""
        async with self._exchange("GET", path, b"") as answer:
            return await answer.body()

    async def post_events(
        self, path: str, request: Mapping[str, object]
    ) -> AsyncIterator[dict[str, object]]:
        """The JSON objects of a server-sent event stream, until its `[DONE]`."""
        async with self._exchange("POST", path, json.dumps(request).encode()) as answer:
            async for data in _events(answer.pieces()):
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise _refusal(event, 200)
                yield event
        raise HttpError(f"{self.url}{path} broke off before its answer was complete.")

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[Answer]:
        headers = {
            "Accept": "application/json, text/event-stream, text/plain",
            "Content-Type": "application/json",
        }
        if self.api_key:
            if not self.api_key.isascii() or not self.api_key.isprintable():
                raise ConfigError("api_key must be printable ASCII.")
            headers["Authorization"] = f"Bearer {self.api_key}"
        async with exchange(self.url, method, path, body, headers) as answer:
            if not 200 <= answer.status < 300:
                raise _refusal(await answer.body(), answer.status)
            yield answer


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The `data` of server-sent events."""
    parser = SseParser()
    async for piece in pieces:
        for data in parser.feed(piece):
            yield data.decode("utf-8", "replace")


def _refusal(answer: bytes | dict[str, object], status: int) -> HttpError:
    """The message of an error answer, in OpenAI's format or any other."""
    try:
        content = json.loads(answer) if isinstance(answer, bytes) else answer
        error = content["error"] if isinstance(content, dict) else None
    except (ValueError, KeyError):
        error = None
    if isinstance(error, dict):
        message, param = str(error.get("message")), error.get("param")
        return HttpError(message, status=status, param=str(param) if param else None)
    if isinstance(error, str):
        return HttpError(f"the server answered {status}: {error}", status=status)
    return HttpError(f"the server answered {status}.", status=status)
