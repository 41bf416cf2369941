"""A request's place among the others, and what it may share with them."""

from __future__ import annotations

import msgspec

LONGEST_RETENTION = 30 * 86400.0


class Retain(msgspec.Struct, frozen=True, omit_defaults=True):
    """A wish that a request's KV stays in the cache longer than others'."""

    seconds: float
    """After its last use. At most `LONGEST_RETENTION`."""
    num_tokens: int | None = None
    """Of its first tokens. None: of all, the generated ones too."""


class Placement(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Passed from the caller to the scheduler; only the adapter's name is replaced by its version."""

    priority: int = 0
    """Lower runs sooner, unless requests are served by arrival alone. 32 bits."""
    tenant: str = "default"
    """The tenant to whom its tokens are charged."""
    weight: float = 1.0
    """Under the fair policy: the tenant's share of the service, relative to others'. Positive."""
    cache_salt: str | None = None
    """Requests share cached blocks only with the same salt."""
    adapter: str | None = None
    """The LoRA adapter with which it is computed: its name, and in the engine core NAME@HASH, its version."""
    retain: tuple[Retain, ...] = ()
    """Where several hold for a token, the longest one counts."""
