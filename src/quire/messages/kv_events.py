"""KV events as they are published: vLLM's format, since its #42892 with maps in place of arrays.

A message has three frames: topic, sequence number (8 bytes, big-endian), and a batch in msgpack.
"""

from __future__ import annotations

import msgspec

BlockHash = int | bytes


class BlockStored(msgspec.Struct, tag=True, kw_only=True, omit_defaults=True, gc=False):
    """A run of blocks of `block_size` tokens is in a cache; each is the parent of the next."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    """Of the block before the first one; None if that begins a prompt."""
    token_ids: list[int]
    """Of all blocks, one after the other."""
    block_size: int
    lora_id: int | None
    """Deprecated in vLLM; always None."""
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[str] | None] | None = None
    """Of each block, what its hash has beside tokens: the adapter's name; for the first of a prompt also the
    salt."""
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    """full_attention or sliding_window."""
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(msgspec.Struct, tag=True, kw_only=True, omit_defaults=True, gc=False):
    block_hashes: list[BlockHash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, kw_only=True, gc=False):
    """No block is in any cache."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    """Seconds since 1970."""
    events: list[KVEvent]
    data_parallel_rank: int = 0
