"""Where a request stands among the others, and what it may share with them."""

from __future__ import annotations

import msgspec


class Placement(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Travels unchanged from the caller to the scheduler."""

    priority: int = 0
    """Lower runs sooner under the priority policy. 32 bits."""
    tenant: str = "default"
    """On whose account it runs."""
    cache_salt: str | None = None
    """Requests share cached blocks only with the same salt."""
    adapter: str | None = None
    """The LoRA adapter that it is computed with."""
