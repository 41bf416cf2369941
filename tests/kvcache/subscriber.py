"""A subscriber to KV events, as a router has one. The structs are written from vLLM 0.33's definition."""

from __future__ import annotations

from typing import Any

import msgspec


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[list[int]] | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


decode = msgspec.msgpack.Decoder(KVEventBatch).decode


class Index:
    """What is cached where: (hash, group, medium) -> (parent's hash, tokens, name of the adapter, extra
    keys)."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[bytes | int, int, str], tuple[Any, ...]] = {}
        self.next = 0
        self.num_gaps = 0

    def take(self, sequence: int, payload: bytes) -> None:
        """A message, perhaps not for the first time."""
        if sequence < self.next:
            return
        if sequence > self.next:
            self.num_gaps += 1
            self.blocks.clear()  # what was removed meanwhile is not known
        self.next = sequence + 1
        for event in decode(payload).events:
            self.apply(event)

    def apply(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if isinstance(event, AllBlocksCleared):
            self.blocks.clear()
        elif isinstance(event, BlockRemoved):
            for block_hash in event.block_hashes:
                self.blocks.pop((block_hash, event.group_idx or 0, event.medium or "GPU"), None)
        else:
            parent, size = event.parent_block_hash, event.block_size
            extra = event.extra_keys or [None] * len(event.block_hashes)
            assert len(event.token_ids) == size * len(event.block_hashes)
            assert len({parent, *event.block_hashes}) == 1 + len(event.block_hashes)  # for Dynamo
            for number, (block_hash, keys) in enumerate(
                zip(event.block_hashes, extra, strict=True)
            ):
                tokens = tuple(event.token_ids[number * size : (number + 1) * size])
                name = (block_hash, event.group_idx or 0, event.medium or "GPU")
                assert name not in self.blocks, "llm-d would wait for two removals"
                self.blocks[name] = (parent, tokens, event.lora_name, keys and tuple(keys))
                parent = block_hash
