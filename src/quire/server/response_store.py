"""Stored responses, in memory. Their number and bytes are limited; the oldest are dropped first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import msgspec

from quire.server.engine_protocol import RequestStream
from quire.server.errors import ApiError

Item = Mapping[str, object]


@dataclass(slots=True)
class StoredResponse:
    id: str
    owner: bytes | None
    """See `middleware.owner_of`. For other owners the response does not exist."""
    items: Sequence[Item]
    """Its input, which includes the conversation of the responses before it."""
    response: dict[str, object]
    """The response in its current state."""
    streams: Sequence[RequestStream] = ()
    """The engine's requests while it is in progress."""
    size: int = field(default=0)

    @property
    def in_flight(self) -> bool:
        return self.response["status"] in ("queued", "in_progress")

    @property
    def conversation(self) -> list[Item]:
        """The conversation that the next response continues."""
        output = self.response["output"]
        assert isinstance(output, list)
        return [*self.items, *output]


class ResponseStore:
    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._stored: dict[str, StoredResponse] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, stored: StoredResponse) -> None:
        self._stored[stored.id] = stored
        self._measure(stored)

    def update(self, response_id: str, response: dict[str, object]) -> None:
        """Set the response's new state, unless it is not stored. A cancelled response stays cancelled,
        with its output so far."""
        stored = self._stored.get(response_id)
        if stored is None:
            return
        if stored.response["status"] == "cancelled":
            response = response | {"status": "cancelled", "completed_at": None}
        stored.response = response
        if not stored.in_flight:
            stored.streams = ()
        self._measure(stored)

    def get(self, response_id: str, owner: bytes | None, *, param: str) -> StoredResponse:
        """Raises a 404 `ApiError`."""
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            raise ApiError(
                404,
                f"There is no response {response_id[:64]!r}: it never was, was deleted, was not stored, or "
                "had to make room.",
                param=param,
            )
        return stored

    def find_items(self, ids: AbstractSet[str], owner: bytes | None) -> dict[str, Item]:
        """Items of inputs and outputs by id, the newest of those with the same id. Raises a 404
        `ApiError` for an unknown id."""
        found: dict[str, Item] = {}
        for stored in reversed(self._stored.values()):
            if len(found) == len(ids):
                break
            if stored.owner == owner:
                for item in reversed(stored.conversation):
                    name = item.get("id")
                    if isinstance(name, str) and name in ids:
                        found.setdefault(name, item)
        for name in sorted(ids - found.keys()):
            raise ApiError(
                404,
                f"There is no item {name[:64]!r} in a stored response. Send the item itself, or set store to "
                "true in the request whose answer it is from.",
                param="input",
            )
        return found

    def remove(self, response_id: str) -> None:
        """Drop the response, and abort it if it is in progress: no client could retrieve it."""
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._bytes -= stored.size
            for stream in stored.streams:
                stream.abort()

    def _measure(self, stored: StoredResponse) -> None:
        """Update its size, and drop old responses. The newest is dropped too if it alone is too large."""
        self._bytes -= stored.size
        stored.size = len(msgspec.json.encode([stored.items, stored.response]))
        self._bytes += stored.size
        while len(self._stored) > self._max_count or self._bytes > self._max_bytes:
            self._forget(next(iter(self._stored)))

    def _forget(self, response_id: str) -> None:
        """Drop a response. If it is in progress it continues: its client may be reading it."""
        self._bytes -= self._stored.pop(response_id).size
