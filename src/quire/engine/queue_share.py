"""Who may still queue when the queue is full.

Up to its limit the queue is everybody's: one tenant alone may fill it. Beyond the limit a request is accepted
if its tenant, with it, holds no more than its share: the limit times its weight, over the weights of all
tenants that hold something. So a flood fills the queue for its own tenant and for nobody else, and as
requests end, their places go to tenants below their shares.

Nobody who was accepted is refused later: a stream may have sent its headers, after which clients do not try
again. The price is that more than the limit may wait. If k tenants of equal weights come one after the other
while nothing ends, it is at most the limit times 1 + 1/2 + ... + 1/k (for other weights, times 1 + ln(sum of
weights / least weight)), and one request for each, since a tenant that holds nothing may bring one that is
larger than its share.
"""

from __future__ import annotations

from dataclasses import dataclass

_ROUNDING = 1e-9


@dataclass(slots=True)
class _Part:
    weight: float
    """As the tenant's last request has it."""
    count: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's part of a limit."""

    held: int
    most: int
    num_tenants: int
    """Among whom the limit is divided."""


class Held:
    """How much of one limit each tenant holds. Only those that hold something are known."""

    def __init__(self) -> None:
        self._parts: dict[str, _Part] = {}
        self.total = 0

    def add(self, tenant: str, weight: float, count: int) -> None:
        part = self._parts.setdefault(tenant, _Part(weight))
        part.weight = weight
        part.count += count
        self.total += count

    def remove(self, tenant: str, count: int) -> None:
        part = self._parts[tenant]
        part.count -= count
        self.total -= count
        assert part.count >= 0, f"{tenant} holds less than nothing"
        if not part.count:
            del self._parts[tenant]

    def of(self, tenant: str) -> int:
        part = self._parts.get(tenant)
        return 0 if part is None else part.count

    def fraction(self, tenant: str, weight: float) -> float:
        """Of its weight in those of all tenants that hold something, and its own."""
        others = sum(part.weight for name, part in self._parts.items() if name != tenant)
        return weight / (weight + others)

    def exceeded(self, limit: int, more: int, tenant: str, weight: float) -> Share | None:
        """None if the tenant may add `more`; else its share, which that would exceed."""
        held = self.of(tenant)
        if self.total + more <= limit or (not held and more <= limit):
            return None
        most = limit * self.fraction(tenant, weight) * (1 + _ROUNDING)
        if held + more <= most:
            return None
        return Share(held, int(most), len(self._parts) + (not held))
