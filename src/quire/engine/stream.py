"""The stream of outputs that a caller of `AsyncLLM` iterates over."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from quire.outputs import RequestOutput


class RequestStream:
    """Outputs of one request, in order, ending with the one that is `finished`.

    Iteration raises `EngineDeadError` if the engine dies. Ending early (cancellation, `aclose`,
    garbage) should go through `abort`, which is idempotent.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        abort: Callable[[str], None],
        sequence_ids: Sequence[int] = (),
    ) -> None:
        """abort: ends the request of this id. sequence_ids: the core's, of its sequences."""
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.sequence_ids = sequence_ids
        self._abort = abort
        self._outputs: deque[RequestOutput | Exception] = deque()
        self._arrived = asyncio.Event()
        self.last: RequestOutput | None = None
        """The latest output, whether or not it has been read."""
        self._ended = False
        """Whether the last output has come; another request may have the same id now."""

    def abort(self) -> None:
        """End the request now; iteration then ends with finish_reason "abort"."""
        if not self._ended:
            self._abort(self.request_id)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[RequestOutput]:
        try:
            while self._outputs or not self._ended:
                while not self._outputs:
                    self._arrived.clear()
                    await self._arrived.wait()
                item = self._outputs.popleft()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.abort()

    def put(self, item: RequestOutput | Exception) -> None:
        """Called by the engine. An exception, or a finished output, is the last item."""
        if isinstance(item, Exception):
            self._ended = True
        else:
            self.last, self._ended = item, item.finished
        self._outputs.append(item)
        self._arrived.set()
