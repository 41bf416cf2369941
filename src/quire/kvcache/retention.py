"""Which cached content clients have asked to keep."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from quire.kvcache.block import BlockContent, Hold


class Retention:
    """Content that is to be evicted after all other content, until it has not been used for a time.

    It is a priority, not a reservation: requests may use every block. And it is bounded, so that the rest
    still works as a cache: beyond `most` contents, the tenant who has the most loses the one that it has not
    used for longest. So one tenant alone may have all, and several have at least equal shares.

    Content enters and is touched tail first, as blocks are released, so the head of a prompt goes last.

    most: contents; each may have a block in every group of layers.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._tenants: dict[str, OrderedDict[BlockContent, Hold]] = {}
        """By last use, the oldest first."""
        self._due: list[tuple[float, int, BlockContent, Hold]] = []
        """A heap with one entry for every hold; it may be earlier than `until`."""
        self._numbers = itertools.count()
        self._count = 0

    @classmethod
    def of_blocks(
        cls,
        num_blocks: int,
        share: float,
        num_groups: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> Retention:
        """Of at most that share of a cache."""
        return cls(int(share * num_blocks) // num_groups, clock=clock)

    def __len__(self) -> int:
        return self._count

    def keep(self, content: BlockContent, tenant: str, seconds: float) -> Iterator[BlockContent]:
        """Yields content that is no longer kept for it, perhaps `content` itself."""
        hold, until = content.hold, self._clock() + seconds
        if hold is not None and hold.until > until:
            seconds, until = hold.seconds, hold.until  # the longer wish counts
        if hold is not None:
            self.drop(content)
        hold = content.hold = Hold(tenant, seconds, until)
        self._tenants.setdefault(tenant, OrderedDict())[content] = hold
        self._count += 1
        heapq.heappush(self._due, (until, next(self._numbers), content, hold))
        if len(self._due) > 2 * self._count + 100:
            self._due = [entry for entry in self._due if entry[2].hold is entry[3]]
            heapq.heapify(self._due)
        while self._count > self.most:
            largest = max(self._tenants.values(), key=len)
            oldest = next(iter(largest))
            self.drop(oldest)
            yield oldest

    def touch(self, content: BlockContent) -> None:
        """It has been used."""
        hold = content.hold
        assert hold is not None
        hold.until = self._clock() + hold.seconds
        self._tenants[hold.tenant].move_to_end(content)

    def drop(self, content: BlockContent) -> None:
        hold, content.hold = content.hold, None
        assert hold is not None
        held = self._tenants[hold.tenant]
        del held[content]
        if not held:
            del self._tenants[hold.tenant]
        self._count -= 1

    def expired(self) -> Iterator[BlockContent]:
        """Content that has not been used for its time, and is not kept any more."""
        if not self._due:
            return
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            _, number, content, hold = heapq.heappop(self._due)
            if content.hold is not hold:
                continue
            if hold.until > now:
                heapq.heappush(self._due, (hold.until, number, content, hold))
            else:
                self.drop(content)
                yield content

    def check_invariants(self) -> None:
        assert sum(map(len, self._tenants.values())) == self._count <= self.most
        due = {id(entry[3]) for entry in self._due}
        for tenant, held in self._tenants.items():
            assert held
            for content, hold in held.items():
                assert content.hold is hold and hold.tenant == tenant and id(hold) in due
                assert any(content.blocks), "kept content has no block"
