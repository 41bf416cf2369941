"""A request's place among the others, and what it may share with them."""

from __future__ import annotations

import msgspec


class Placement(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Passed from the caller to the scheduler; only the adapter's name is replaced by its version."""

    priority: int = 0
    """Lower runs sooner under the priority policy. 32 bits."""
    tenant: str = "default"
    """The tenant to whom its tokens are charged."""
    cache_salt: str | None = None
    """Requests share cached blocks only with the same salt."""
    adapter: str | None = None
    """The LoRA adapter with which it is computed: its name, and in the engine core NAME@HASH, its version."""
