"""Which requests have passed their deadlines."""

from __future__ import annotations

from heapq import heapify, heappop, heappush


class Deadlines:
    """Of the requests that have one and have not ended. True if there are any."""

    def __init__(self) -> None:
        self._of: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        """Also with some that have ended."""

    def __bool__(self) -> bool:
        return bool(self._of)

    def add(self, request_id: int, deadline: float) -> None:
        self._of[request_id] = deadline
        heappush(self._heap, (deadline, request_id))

    def ended(self, request_id: int) -> None:
        if self._of.pop(request_id, None) is None or len(self._heap) < 2 * len(self._of) + 64:
            return
        self._heap = [(deadline, request_id) for request_id, deadline in self._of.items()]
        heapify(self._heap)

    def passed(self, now: float) -> list[int]:
        """Those that are over, once."""
        ids = []
        while self._heap and self._heap[0][0] <= now:
            request_id = heappop(self._heap)[1]
            if self._of.pop(request_id, None) is not None:
                ids.append(request_id)
        return ids
