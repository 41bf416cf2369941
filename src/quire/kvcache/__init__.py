"""The paged KV cache's bookkeeping, in pure Python (never imports torch)."""

from quire.kvcache.block import NULL_BLOCK_ID, Block, BlockContent, CacheKey, FreeList, hash_block
from quire.kvcache.block_pool import BlockPool
from quire.kvcache.connector import KVConnector
from quire.kvcache.manager import KVCacheManager
from quire.kvcache.misses import Loaded, Misses
from quire.kvcache.observer import CacheObserver, Change, ChangeKind, ChangeLog, ChangeStream
from quire.kvcache.tables import Growth, PrefixMatch
from quire.kvcache.tier_changes import TierChanges
from quire.kvcache.transfers import Transfers

__all__ = [
    "NULL_BLOCK_ID",
    "Block",
    "BlockContent",
    "BlockPool",
    "CacheKey",
    "CacheObserver",
    "Change",
    "ChangeKind",
    "ChangeLog",
    "ChangeStream",
    "FreeList",
    "Growth",
    "KVCacheManager",
    "KVConnector",
    "Loaded",
    "Misses",
    "PrefixMatch",
    "TierChanges",
    "Transfers",
    "hash_block",
]
