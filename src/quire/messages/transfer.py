"""Blocks that a plan moves between the cache and stores outside it."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from quire.messages.core import KVSource

BlockName = tuple[bytes, int]
"""Identifies KV in any store: the hash of a block's tokens and all before them, and the group of layers."""


class TierChange(NamedTuple):
    """A tier has stored or removed a block."""

    tier: str
    """Its label: ram, disk."""
    name: BlockName
    stored: bool


class Transfer(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Blocks to load from a store into the cache. The transfer holds them until its result arrives, possibly
    with the result of a later plan."""

    transfer_id: int
    names: list[BlockName]
    block_ids: list[int]
    """Their places in the cache."""
    source: KVSource | None = None
    """Another instance that has what this one's store lacks."""
    timeout: float = 60.0
    """Seconds after which the worker reports what it has, and writes to these blocks no more."""


class Save(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Blocks to copy from the cache to a store. They are copied as they are before the plan's copies, loads
    and rows, so the plan itself may overwrite them; nothing holds them, and there is no result."""

    names: list[BlockName]
    block_ids: list[int]
    ticket: str | None = None
    """Another instance will fetch them with this ticket: they are held until its lease ends. None: they
    are for this instance's own use."""


class TransferResult(msgspec.Struct, kw_only=True, frozen=True):
    """A load is over."""

    transfer_id: int
    num_good: int
    """The number of its leading blocks that were loaded."""
    sources: dict[str, int] = {}
    """Of these, by where they were: "ram", "disk", "peer"."""
    late: bool = False
    """Whether it ended because its time was over."""
