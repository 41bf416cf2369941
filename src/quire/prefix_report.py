"""How much of a prompt's KV was found at a request's admission, where, and why no more."""

from __future__ import annotations

from enum import Enum

import msgspec


class MissReason(str, Enum):
    """What first stopped the search for a prompt's KV, at the first token that was not found."""

    WHOLE = "whole_prompt"
    """Nothing: all tokens were found but the last, which must be computed to sample the next."""
    BOUNDARY = "block_boundary"
    """Only whole blocks are shared, and the rest of the prompt is shorter than one, or is the last block,
    which cannot be copied in this step."""
    OFF = "caching_off"
    """The engine runs without a prefix cache."""
    CAPPED = "capped"
    """The request itself: `prompt_logprobs`, a mean over the prompt, or `skip_reading_prefix_cache`."""
    EVICTED = "evicted"
    """It was cached, and its block was needed for other tokens."""
    RESET = "reset"
    """It was cached until the prefix cache was reset."""
    NOT_LOADED = "not_loaded"
    """A store outside the cache has it, but the cache had no room for a load."""
    LOAD_LATE = "load_late"
    """A load took too long."""
    LOAD_FAILED = "load_failed"
    """A load ended without it: the store had it no more, or it was damaged."""
    ADAPTER = "other_adapter"
    """It is cached, but computed with another adapter."""
    SALT = "other_salt"
    """It is cached under another salt. For operators only, see `PrefixReport.for_client`."""
    UNSEEN = "never_seen"
    """It was not computed before, or so long ago that the record of evicted blocks has lost it."""


class PrefixReport(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Prompt tokens at the first admission, by where their KV came from, and why the rest was not found. All
    counts together are the prompt's length; they follow each other in this order."""

    device: int = 0
    """Found in the KV cache."""
    ram: int = 0
    disk: int = 0
    peer: int = 0
    """Loaded from host memory, from disk, from another instance."""
    computed: int
    reason: MissReason
    since_step: int = 0
    """With `evicted` and `reset`: the step before or in which it happened; 0 if that is not known."""
    seconds_ago: float = 0.0
    """With `evicted` and `reset`: how long before the admission."""

    @property
    def external(self) -> int:
        """Tokens loaded from outside the cache."""
        return self.ram + self.disk + self.peer

    @property
    def cached(self) -> int:
        """Tokens whose KV was found; the position of the first one that was not."""
        return self.device + self.external

    def for_client(self) -> PrefixReport:
        """Without what concerns other tenants: that somebody else has used the same prompt."""
        if self.reason is not MissReason.SALT:
            return self
        return msgspec.structs.replace(self, reason=MissReason.UNSEEN)

    def __str__(self) -> str:
        found = (f"{getattr(self, name)} from {name}" for name in ("device", "ram", "disk", "peer"))
        parts = [part for part in found if not part.startswith("0 ")]
        text = ", ".join([*parts, f"{self.computed} computed"])
        ago = f" {self.seconds_ago:.1f} s ago" if self.since_step else ""
        return f"{text}; at {self.cached}: {self.reason.value}{ago}"
