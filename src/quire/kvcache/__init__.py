"""The paged KV cache's bookkeeping, in pure Python (never imports torch)."""

from quire.kvcache.block import NULL_BLOCK_ID, Block, BlockContent, FreeList, hash_block, root_hash
from quire.kvcache.block_pool import BlockPool
from quire.kvcache.manager import Growth, KVCacheManager, PrefixMatch

__all__ = [
    "NULL_BLOCK_ID",
    "Block",
    "BlockContent",
    "BlockPool",
    "FreeList",
    "Growth",
    "KVCacheManager",
    "PrefixMatch",
    "hash_block",
    "root_hash",
]
