"""Fair shares of tenants: the virtual token counters of VTC (Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024), in an order that does not move while requests run.

Each tenant has a counter of the service that it got, divided by its weight. At each admission, the tenant
with the least counter is next, with its first request that came. It pays for its prompt at once, 1 for each
token that is not found in the cache, and 2 for each token that it generates. A tenant that had nothing queued
begins again at the least counter of those that have, so nobody saves up service. While two tenants have
requests queued, what they got differs by at most 2U / weight in any interval, where U is the charge of the
longest prompt or of the tokens of all admitted requests.

The total order (docs/adr/0002-one-order.md) has two classes: every request that was ever admitted is
before every one that was not.

* Those that were admitted are ordered by (priority as admitted, number of the admission). That is fixed at
  the first admission, and decides budget, victims and who is resumed first. Nobody who is admitted later gets
  before one that has been preempted. So that one can only be preempted again by those that were before it
  then, which end; and while it waits, nobody else is admitted.
* Those that were not are ordered by priority, then by the counters. Each priority has counters of its own:
  else a tenant could save up service with requests that wait behind more urgent ones. In a priority that gets
  no turn, each tenant's first request moves up by one of the priorities that are waited in per `aging`
  seconds, so that none starves.

Counters are read only when a request may be admitted. Tokens that requests have generated since are charged
then, and only to tenants whose turn it might be: without them a counter is too small, never too large. So a
heap of counters as they were is searched until its least is right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter

from quire.messages import TenantStats
from quire.scheduler.decisions import Standing
from quire.scheduler.queue import Clock, Placed, RequestQueue
from quire.scheduler.request import Request, RequestStatus

PROMPT_TOKEN = 1.0
GENERATED_TOKEN = 2.0
MOST_PRIORITIES = 64
"""Those that are not in use are forgotten beyond that."""
FEW_ACCOUNTS = 256
"""Of a priority. Beyond that, those that make no difference are forgotten."""
REPORT_SECONDS = 1.0


class Account:
    """A tenant's requests of one priority. While it exists, `queue` holds those that were never admitted."""

    __slots__ = (
        "_origin", "_paid_tokens", "_units", "admitted", "charged", "counter", "entry", "last_number",
        "queue", "since", "tenant", "weight",
    )  # fmt: skip

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.weight = 1.0
        self.counter = 0.0
        """As of the last charge. Does not depend on the number of charges: units are whole."""
        self._origin = self._units = 0.0
        self.charged = 0.0
        """Units since the last report."""
        self.queue = RequestQueue()
        self.admitted: dict[int, Request] = {}
        """Running or preempted."""
        self.entry: Entry | None = None
        """In its level's heap, while it has requests queued."""
        self.last_number = 0
        """Of its last admission."""
        self.since = 0.0
        """When it had the last admission, or began to wait."""
        self._paid_tokens = 0
        """Of admitted requests, all that `settle` has seen."""

    def begin(self, counter: float, weight: float) -> None:
        """Charge from here on by another weight, and from at least this counter."""
        self.settle()
        self._origin, self._units = max(self.counter, counter), 0.0
        self.counter, self.weight = self._origin, weight

    def charge(self, units: float) -> None:
        self._units += units
        self.charged += units
        self.counter = self._origin + self._units / self.weight

    def settle(self) -> bool:
        """Charge the tokens that were generated since the last time, if there are any. Written out: it is
        most of what the policy costs."""
        known = 0
        for request in self.admitted.values():
            known += len(request.token_ids)
        tokens = known - self._paid_tokens
        if not tokens:
            return False
        self._paid_tokens = known
        units = GENERATED_TOKEN * tokens
        self._units += units
        self.charged += units
        self.counter = self._origin + self._units / self.weight
        return True

    def enter(self, request: Request) -> None:
        self.admitted[request.request_id] = request
        self._paid_tokens += len(request.token_ids)

    def leave(self, request: Request) -> None:
        """What it generated is charged the next time."""
        del self.admitted[request.request_id]
        self._paid_tokens -= len(request.token_ids)


Entry = tuple[float, int, int, Account]
"""An account's counter and last admission, not greater than now; and a number, so that no two are equal. Of
equal counters, the one whose last admission was first is next: that of a tenant that comes back."""


class Level:
    """The accounts of one priority."""

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.accounts: dict[str, Account] = {}
        self.queued: dict[str, Account] = {}
        """Those that have requests queued."""
        self._heap: list[Entry] = []
        """Also with entries that are not their accounts' any more."""
        self._serial = 0
        self._last: Account | None = None
        """The last that had."""
        self._reached = 0.0
        """The counter at which a tenant begins. It never falls, so an account below it can be forgotten."""
        self._sweep_at = FEW_ACCOUNTS

    def add(self, request: Request, now: float) -> None:
        tenant = request.placement.tenant
        account = self.accounts.get(tenant)
        if account is None:
            if len(self.accounts) >= self._sweep_at:
                self._sweep()
            account = self.accounts[tenant] = Account(tenant)
        weight = request.placement.weight
        if not account.queue:
            account.begin(self._begin(), weight)
            account.since = now
            self.queued[tenant] = account
            self._push(account)
        elif account.weight != weight:
            account.begin(0.0, weight)
        account.queue.add(request)

    def remove(self, request: Request) -> None:
        account = self.accounts[request.placement.tenant]
        account.queue.remove(request)
        if not account.queue:
            del self.queued[account.tenant]
            self._last, account.entry = account, None

    def refund(self, account: Account, tokens: int) -> None:
        """Of prompts."""
        account.charge(-PROMPT_TOKEN * tokens)
        if account.entry is not None:
            self._push(account)

    def candidates(self) -> Iterator[Request]:
        passed: dict[str, int] = {}
        """Of each tenant, the first requests that were not admitted."""
        left: list[Account] | None = None
        """Those that have others. None: all."""
        while self.queued if left is None else left:
            account = self._least() if left is None else _least_of(left)
            index = passed.get(account.tenant, 0)
            while index < len(account.queue):
                request = account.queue[index]
                yield request
                if request.was_admitted:
                    break
                index += 1
            if index:
                passed[account.tenant] = index
            if passed:
                accounts = self.queued.values()
                left = [each for each in accounts if len(each.queue) > passed.get(each.tenant, 0)]

    def _begin(self) -> float:
        """The counter of a tenant that begins to wait."""
        if self.queued:
            self._reached = max(self._reached, self._least().counter)
        elif self._last is not None:
            self._last.settle()
            self._reached = max(self._reached, self._last.counter)
        return self._reached

    def _least(self) -> Account:
        """The account whose turn it is. There is one."""
        heap = self._heap
        while True:
            entry = heap[0]
            account = entry[3]
            if account.entry is not entry:
                heappop(heap)
                continue
            account.settle()
            if entry[0] == account.counter and entry[1] == account.last_number:
                return account
            heapreplace(heap, self._new_entry(account))

    def _push(self, account: Account) -> None:
        if len(self._heap) > 2 * len(self.queued) + 64:
            self._heap = [entry for entry in self._heap if entry[3].entry is entry]
            heapify(self._heap)
        heappush(self._heap, self._new_entry(account))

    def _new_entry(self, account: Account) -> Entry:
        self._serial += 1
        entry = account.entry = (account.counter, account.last_number, self._serial, account)
        return entry

    def _sweep(self) -> None:
        """Forget the tenants that have gone and would begin where a new one does. One that got more is kept
        until the others have got as much."""
        reached = self._begin()
        for account in list(self.accounts.values()):
            if not account.queue and not account.admitted:
                account.settle()
                if account.counter <= reached and not account.charged:
                    del self.accounts[account.tenant]
        self._sweep_at = max(FEW_ACCOUNTS, 2 * len(self.accounts))


def _least_of(accounts: Iterable[Account]) -> Account:
    """`Level._least` of some."""
    for account in accounts:
        account.settle()
    return min(accounts, key=attrgetter("counter", "last_number"))


class _Receipt:
    """What an admitted request has paid for."""

    __slots__ = ("account", "level", "reached")

    def __init__(self, level: Level, account: Account, reached: int) -> None:
        self.level, self.account = level, account
        self.reached = reached
        """Prompt tokens that it has computed, or did not have to. The others are paid, and refunded if it
        ends before."""


class FairQueue:
    """The policy. aging: seconds; 0 for no aging."""

    def __init__(self, aging: float, clock: Clock) -> None:
        self._aging, self._clock = aging, clock
        self._levels: dict[int, Level] = {}
        self._preempted = RequestQueue()
        self._receipts: dict[int, _Receipt] = {}
        """By request, of those that were admitted."""
        self._were_preempted: Counter[int] = Counter()
        """Requests that have not ended, by their priority as admitted."""
        self._number = 0
        self._len = 0
        self._aged_at = self._reported_at = -math.inf
        self._shown: set[str] = set()
        """Tenants whose last report had requests."""
        self._has_news = False

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Request]:
        yield from self._preempted
        for level in self._by_priority():
            for account in level.queued.values():
                yield from account.queue

    def first(self) -> Request | None:
        if self._preempted:
            return self._preempted[0]
        for level in self._by_priority():
            for account in level.queued.values():
                return account.queue[0]
        return None

    def waiting_key(self, request: Placed) -> tuple[float, ...]:
        """After every admitted request of its priority."""
        return _key(request.placement.priority, request)

    def add(self, request: Request) -> None:
        self._len += 1
        self._has_news = True
        if request.status is RequestStatus.PREEMPTED:
            self._preempted.add(request)
            self._were_preempted[int(request.sort_key[0])] += request.num_preemptions == 1
        else:
            self._level(request.placement.priority).add(request, self._clock())

    def remove(self, request: Request) -> None:
        self._len -= 1
        if request.status is RequestStatus.PREEMPTED:
            self._preempted.remove(request)
        else:
            self._levels[int(request.sort_key[0])].remove(request)

    def candidates(self) -> Iterator[Request]:
        yield from list(self._preempted)
        levels = self._by_priority()
        if len(levels) > 1 and self._aging:
            self._age(levels)
        for level in levels:
            yield from level.candidates()

    def admitted(self, request: Request, num_found: int) -> None:
        """The first admission fixes its place, and charges its prompt, unless another request has paid for
        that. Later ones are free."""
        found = min(num_found, request.num_prompt_tokens)
        receipt = self._receipts.get(request.request_id)
        if receipt is not None:
            if found > receipt.reached:  # others have computed what it had not yet
                receipt.level.refund(receipt.account, found - receipt.reached)
                receipt.reached = found
            return
        level = self._levels[int(request.sort_key[0])]
        account = level.accounts[request.placement.tenant]
        if request.fork_of is not None:
            found = request.num_prompt_tokens
        account.charge(PROMPT_TOKEN * (request.num_prompt_tokens - found))
        account.enter(request)
        self._receipts[request.request_id] = _Receipt(level, account, found)
        self._number += 1
        account.last_number, account.since = self._number, self._clock()
        priority = level.priority
        if self._were_preempted:
            priority = max(priority, *self._were_preempted)
        request.sort_key = (priority, self._number)

    def stopped(self, request: Request) -> None:
        receipt = self._receipts[request.request_id]
        computed = min(request.num_computed_tokens, request.num_prompt_tokens)
        receipt.reached = max(receipt.reached, computed)

    def ended(self, request: Request) -> None:
        receipt = self._receipts.pop(request.request_id, None)
        if receipt is None:
            return
        if request.num_preemptions:
            priority = int(request.sort_key[0])
            self._were_preempted[priority] -= 1
            if not self._were_preempted[priority]:
                del self._were_preempted[priority]
        if receipt.reached < request.num_prompt_tokens:
            receipt.level.refund(receipt.account, request.num_prompt_tokens - receipt.reached)
        receipt.account.leave(request)

    def standing(self, request: Request) -> Standing:
        receipt = self._receipts.get(request.request_id)
        if receipt is None:
            level = self._levels[int(request.sort_key[0])]
            account = level.accounts[request.placement.tenant]
        else:
            account = receipt.account
        account.settle()
        return Standing(account.tenant, account.counter)

    def take_tenants(self) -> dict[str, TenantStats]:
        """Once per second, and when no request is left."""
        if not self._has_news:
            return {}
        now = self._clock()
        is_idle = not self._len and not self._receipts
        if now - self._reported_at < REPORT_SECONDS and not is_idle:
            return {}
        self._reported_at, self._has_news = now, not is_idle
        tenants: dict[str, TenantStats] = {}
        for level in self._levels.values():
            for tenant, account in level.accounts.items():
                account.settle()
                stats = tenants.setdefault(tenant, TenantStats())
                stats.charged += account.charged
                account.charged = 0.0
                running = [
                    r for r in account.admitted.values() if r.status is RequestStatus.RUNNING
                ]
                stats.running += len(running)
                stats.waiting += len(account.queue) + len(account.admitted) - len(running)
        shown = {tenant for tenant, stats in tenants.items() if stats.running or stats.waiting}
        changed = {
            tenant: stats
            for tenant, stats in tenants.items()
            if tenant in shown or tenant in self._shown or stats.charged
        }
        for tenant in self._shown - tenants.keys():
            changed[tenant] = TenantStats()
        self._shown = shown
        return changed

    def check_invariants(self) -> None:
        assert len(list(self)) == self._len
        keys = [request.sort_key for request in self._preempted]
        assert keys == sorted(keys)
        for priority, level in self._levels.items():
            assert level.queued == {t: a for t, a in level.accounts.items() if a.queue}
            for tenant, account in level.accounts.items():
                entry = account.entry
                assert (entry is not None) == (tenant in level.queued)
                if entry is not None:
                    assert any(entry is other for other in level._heap)
                    assert entry[:2] <= (account.counter, account.last_number)
                for request in account.queue:
                    assert request.sort_key == _key(priority, request)
                    assert request.placement.tenant == tenant and not request.was_admitted
        accounts = [a for level in self._levels.values() for a in level.accounts.values()]
        paid = {request_id: account for account in accounts for request_id in account.admitted}
        assert paid == {request_id: each.account for request_id, each in self._receipts.items()}

    def _by_priority(self) -> list[Level]:
        """Those that have requests queued."""
        levels = [level for level in self._levels.values() if level.queued]
        return sorted(levels, key=lambda level: level.priority) if len(levels) > 1 else levels

    def _level(self, priority: int) -> Level:
        level = self._levels.get(priority)
        if level is None:
            if len(self._levels) >= MOST_PRIORITIES:
                self._levels = {
                    priority: level
                    for priority, level in self._levels.items()
                    if any(a.queue or a.admitted for a in level.accounts.values())
                }
            level = self._levels[priority] = Level(priority)
        return level

    def _age(self, levels: list[Level]) -> None:
        now = self._clock()
        if now - self._aged_at < self._aging / 16:
            return
        self._aged_at = now
        best = levels[0]
        for rank, level in enumerate(levels[1:], 1):
            for account in list(level.queued.values()):
                if now - account.since >= self._aging * rank:
                    request = account.queue[0]
                    level.remove(request)
                    request.sort_key = _key(best.priority, request)
                    best.add(request, now)
                    account.since = now


def _key(priority: int, request: Placed) -> tuple[float, ...]:
    return (priority, math.inf, request.arrival_time, request.request_id)
