"""The interfaces of what moves KV between a rank's cache and stores outside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from quire.messages import BlockName, KVSource, TierChange, TierStats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BlockBytes: TypeAlias = "NDArray[np.uint8]"
"""The KV of one block in this rank's layers and heads, as the cache has it: [block_bytes]."""


Note = Callable[[BlockName, bool], object]
"""A block was stored (True) or removed (False). Called from any thread."""


def ignore(name: BlockName, stored: bool) -> None:
    """A `Note`."""


class Closable(Protocol):
    def close(self) -> None:
        """Idempotent."""
        ...


class Tier(Protocol):
    """A store of one rank's blocks: host memory, a disk. All methods may be called from any thread."""

    note: Note
    """Called when a block was put into it, or is in it no longer. The owner may set it at any time."""

    @property
    def label(self) -> str:
        """In metrics and reports: "ram", "disk"."""
        ...

    def has(self, name: BlockName) -> bool:
        """Whether `get` will probably find it. Does no I/O and never waits: the scheduler asks for many in a
        step."""
        ...

    def put(self, name: BlockName, data: BlockBytes) -> bool:
        """Keep a copy, at the expense of what was used longest ago; what it has already counts as used now.
        False: it has no room for it or is out of order. Never raises."""
        ...

    def get(self, name: BlockName, out: BlockBytes) -> bool:
        """Write the KV to `out`. False: it has not got it, or what it has is damaged. Never raises."""
        ...

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        ...

    @property
    def capacity(self) -> int:
        """The most that it takes, in bytes."""
        ...

    @property
    def is_on(self) -> bool:
        """Whether no error has ended its use."""
        ...

    @property
    def counts(self) -> Counter[str]:
        """Since the start, by the names of `TierStats`."""
        ...

    def __len__(self) -> int:
        """Blocks."""
        ...

    def clear(self) -> None:
        """Forget everything: the weights may be others from now on."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class Snapshot(Protocol):
    """Blocks that are being copied out of the cache."""

    def wait(self) -> None:
        """Until the copies are complete. From any thread, and more than once."""
        ...


class KVMemory(Protocol):
    """A rank's KV cache, as bytes."""

    @property
    def block_bytes(self) -> int: ...

    def mark(self) -> object:
        """The plans that have been launched so far, for `write`. Called by the thread that launches plans."""
        ...

    def read(
        self, block_ids: Sequence[int], groups: Sequence[int], out: Sequence[BlockBytes]
    ) -> Snapshot:
        """Copy the blocks as they are after the plans that have been launched, each to its `out`. Later plans
        may overwrite the blocks at once. Called by the thread that launches plans. groups: of each block;
        what its group does not use is zeros."""
        ...

    def write(self, block_ids: Sequence[int], data: NDArray[np.uint8], after: object) -> None:
        """data: [n, block_bytes]. No plan launched after the mark `after` reads or writes these blocks.
        Plans launched from the return on read the data. From any thread."""
        ...


class Peers(Protocol):
    """Other instances, as one rank asks them. All methods may be called from several threads."""

    def fetch(
        self,
        source: KVSource,
        names: Sequence[BlockName],
        out: NDArray[np.uint8],
        timeout: float,
    ) -> int:
        """Write the KV of leading names, in this rank's layers and heads, to `out`: [n, block_bytes]. Returns
        how many there are, verified. Nothing is written after the return. Takes at most about `timeout`
        seconds. Never raises. Called several times for one source, in the order of the names."""
        ...

    def done(self, source: KVSource) -> None:
        """This rank fetches no more with the source's ticket. Does not wait."""
        ...

    def hold(self, source: KVSource) -> None:
        """From now on renew the lease, until `done` or `release`. Does not wait. At the sampling rank, for
        all ranks."""
        ...

    def release(self, source: KVSource) -> None:
        """No rank of this instance will fetch, or fetch more. Does not wait."""
        ...

    def close(self) -> None:
        """Ends calls of `fetch` that are under way. Idempotent."""
        ...


class Exports(Protocol):
    """KV that this rank holds for other instances, by ticket."""

    def issue(self, names: Sequence[BlockName]) -> str | None:
        """A ticket for these blocks, for which room is kept from now on. None: there is none. At the
        sampling rank; the others hear of the ticket with the `Save`."""
        ...

    @property
    def used_bytes(self) -> int: ...

    def __len__(self) -> int:
        """Tickets."""
        ...

    def reserve(self, ticket: str, names: Sequence[BlockName]) -> Sequence[BlockBytes] | None:
        """Memory for the KV of these names, whose copies are about to begin. None: no room, and who comes
        with the ticket finds nothing. Does not wait. Called by the thread that launches plans."""
        ...

    def ready(self, ticket: str, snapshot: Snapshot) -> None:
        """What was reserved for the ticket is filled once the snapshot has been waited for. Does not wait."""
        ...

    def clear(self) -> None:
        """As `Tier.clear`."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class Store(Protocol):
    """A rank's store, as the scheduler's connector asks it."""

    def has(self, name: BlockName) -> bool:
        """Whether this rank will probably find it here. Does no I/O and never waits."""
        ...

    def wants(self, name: BlockName) -> bool:
        """Whether it would keep a copy: the first tier that is on has none, nor is one on its way. Never
        waits."""
        ...

    def seconds(self, num_blocks: int, *, from_peer: bool) -> float:
        """The expected time to load so many blocks, by what lately was measured; 0.0 before that."""
        ...

    def issue(self, names: Sequence[BlockName]) -> str | None:
        """As `Exports.issue`."""
        ...

    def expect(self, source: KVSource) -> None:
        """As `Peers.hold`."""
        ...

    def release(self, source: KVSource) -> None:
        """As `Peers.release`."""
        ...

    def totals(self) -> dict[str, TierStats]:
        """By the labels of its parts. The counts are since its start."""
        ...

    def changes(self) -> list[TierChange]:
        """Of its tiers since the last call; the first call begins to record them. Without those before the
        stores were cleared, and without what a disk had at the start."""
        ...
