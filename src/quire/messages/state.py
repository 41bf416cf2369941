"""What an engine core shows of its state to operators: the answer to an `Inspect`."""

from __future__ import annotations

import msgspec

CELL_OWNER = 0x0FFF
"""In a cell of `BlockMap.cells`: the place of its holder in `CoreState.requests`, from 1; 0: none there."""
CELL_CACHED = 0x1000
"""Not held, and its content can be found."""
CELL_HELD = 0x2000
"""Held by something else than a request in the list: a transfer, or a request beyond the list."""
CELL_SHARED = 0x4000
"""Held more than once; the owner is the first of the list that holds it."""


class WaitState(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Why a request waits: a `Wait` of the scheduler, with the reason as text."""

    reason: str
    label: str
    """`capacity` or `deferred`, as in metrics."""
    because_of: int | None = None
    needed: int = 0
    free: int = 0


class RequestState(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A request that has not ended. Numbers and names only: no text, no token."""

    request_id: int
    status: str
    """running, waiting, preempted, or preparing (its grammar or adapter is awaited)."""
    tenant: str
    adapter: str | None = None
    """NAME@HASH."""
    priority: int = 0
    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, found in the cache or outside it at the first admission."""
    output_tokens: int = 0
    computed_tokens: int = 0
    max_tokens: int = 0
    blocks: int = 0
    """Held, in the first group of layers."""
    shared_blocks: int = 0
    """Of these, held by others too."""
    seconds: float = 0.0
    """Since it came to the scheduler."""
    queued_seconds: float = 0.0
    """Of these, before its first admission."""
    preemptions: int = 0
    wait: WaitState | None = None


class BlockMap(msgspec.Struct, kw_only=True, frozen=True):
    """Who holds which block of the KV cache."""

    num_blocks: int
    """Without the null block."""
    block_size: int
    num_free: int
    num_cached: int
    """Contents that can be found, in free blocks and in held ones."""
    num_shared: int
    cells: bytes
    """Of each block in the order of ids, 16 bits, low byte first: see `CELL_OWNER`. Empty for a pool that is
    too large to be read between two steps (`kvcache/block_map.py`)."""


class CoreState(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An engine core between two steps."""

    replica: int = 0
    """Set by the receiver, if there are several."""
    cost_seconds: float
    """What it took to gather this."""
    sleep_level: int = 0
    num_running: int
    num_waiting: int
    """Also those that are preparing."""
    requests: list[RequestState]
    """Running ones first, both in their order. The first of each, if there are very many."""
    blocks: BlockMap
    adapters: list[str] = []
    """Keys of those in memory, least recently used first."""
    standings: dict[str, float] = {}
    """Under the fair policy: what tenants have been charged, divided by their weights."""
