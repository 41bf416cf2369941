"""The paged KV cache's bookkeeping, in pure Python (never imports torch)."""

from quire.kvcache.block import NULL_BLOCK_ID, Block, BlockContent, CacheKey, FreeList, hash_block
from quire.kvcache.block_pool import BlockPool
from quire.kvcache.connector import KVConnector
from quire.kvcache.manager import Growth, KVCacheManager, PrefixMatch
from quire.kvcache.transfers import Transfers

__all__ = [
    "NULL_BLOCK_ID",
    "Block",
    "BlockContent",
    "BlockPool",
    "CacheKey",
    "FreeList",
    "Growth",
    "KVCacheManager",
    "KVConnector",
    "PrefixMatch",
    "Transfers",
    "hash_block",
]
