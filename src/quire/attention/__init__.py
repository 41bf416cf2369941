"""Attention over a paged KV cache: the step's metadata, the cache's memory, and the backends."""
