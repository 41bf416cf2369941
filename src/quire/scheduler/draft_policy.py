"""How many drafts: as many as make the expected number of tokens per second largest.

A draft is accepted if all drafts before it are, so with an acceptance `a` the n-th is with probability
a ** n (its survival). A step with R rows yields R tokens and those of the accepted drafts. Slots are taken
in the order of their survival over all requests, and the best number of them is the one with the most tokens
per second, by the measured time of a step (`CostModel.sampling`) and of proposing.

Where drafts do not pay, none are asked for, and nothing is proposed. Rare probes notice when that changes:
they may take `PROBE_SHARE` of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace

from quire.scheduler.cost_model import CostModel
from quire.scheduler.request import Request

PROBE_SHARE = 0.005
LOOK_AHEAD = 8
"""A slot may not pay alone but with those after it, where a kernel computes so many for the price of one."""
MEMORY = 7 / 8
"""What an outcome leaves of the weight of those before it, for a request; the drafter's is longer."""
DRAFTER_MEMORY = 127 / 128
PRIOR_WEIGHT = 2.0
REST_STEPS, MOST_REST_STEPS = 8, 64
"""For so many steps nothing is decided again after drafts did not pay; twice as many after each time until a
draft is right. A decision takes a tenth of a small model's step."""
MEASURED_AT_REST = 8
"""Of the steps without a decision, one in so many is measured."""
REFRESH_STEPS = 128
"""After so many steps with drafts one is made with none, or with half of them, to compare."""


class DraftPolicy:
    """All the drafts that there may be: a fixed number."""

    def learn(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """num_drafts: verified, of which the first num_accepted were right."""

    def measure(
        self, num_tokens: int, num_samples: int, asked: int, seconds: float, draft_seconds: float
    ) -> None:
        """A step is over. num_samples: with those after drafts. asked: drafts asked for in it.
        draft_seconds: the part of its time that proposing took."""

    def rests(self, num_rows: int) -> bool:
        """Whether no drafts are asked for in this step, which has so many rows."""
        return False

    def skips(self, seconds: float) -> bool:
        """Whether a step of so many seconds, which is over, need not be measured."""
        return False

    def ask(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[int]:
        """The number of drafts to ask for, per request that the next step samples. limits: the most of
        each."""
        return limits

    def grant(
        self, requests: Sequence[Request], limits: Sequence[int], num_rows: int, prompts: bool
    ) -> Sequence[int]:
        """The number of proposed drafts to verify. limits: how many there are. num_rows: that sample, with
        those without drafts. prompts: whether the step also computes prompts."""
        return limits


class AdaptivePolicy(DraftPolicy):
    def __init__(self, most: int, costs: CostModel) -> None:
        """most: drafts per request."""
        self.costs, self.cost = costs, costs.sampling
        self._most = most
        self._right, self._tried = 0.7 * 4, 4.0
        """The drafter's outcomes, which are a new request's prior."""
        self.propose_seconds = 0.0
        """Time of proposing, per draft asked for."""
        self._probe_seconds = 0.0
        """Time that probes may take."""
        self._next_probe = 0.0
        """What the next one takes, about."""
        self._num_probes = 0
        self._rest_size, self._rest, self._rest_rows = REST_STEPS, 0, 0
        """For so many steps none are asked for, if at least so many rows are sampled."""
        self._asked_rows = 0
        """The number of rows for which drafts were asked last."""
        self._num_drafted = 0
        """Steps with drafts."""

    # --- what happened --------------------------------------------------------------------------------

    def learn(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        right, tried = request.drafts_right, request.drafts_tried
        for index in range(min(num_accepted + 1, num_drafts)):
            right = MEMORY * right + (index < num_accepted)
            tried = MEMORY * tried + 1
            self._right = DRAFTER_MEMORY * self._right + (index < num_accepted)
            self._tried = DRAFTER_MEMORY * self._tried + 1
        request.drafts_right, request.drafts_tried = right, tried
        if num_accepted:
            self._rest_size, self._rest = REST_STEPS, 0

    def measure(
        self, num_tokens: int, num_samples: int, asked: int, seconds: float, draft_seconds: float
    ) -> None:
        if asked:
            each, known = draft_seconds / asked, self.propose_seconds
            # What disturbs a measurement makes it longer: down at once, up slowly.
            self.propose_seconds += (
                0.5 * (each - known)
                if each < known
                else 0.1 * (min(each, 2 * known or each) - known)
            )
        self._probe_seconds += PROBE_SHARE * seconds
        if num_tokens == num_samples:
            self.cost.observe(num_samples, max(seconds - draft_seconds, 1e-9))

    def acceptance(self, request: Request) -> float:
        prior = self._right / self._tried
        return (PRIOR_WEIGHT * prior + request.drafts_right) / (PRIOR_WEIGHT + request.drafts_tried)

    # --- decisions ------------------------------------------------------------------------------------

    def rests(self, num_rows: int) -> bool:
        if not self._rest or num_rows < self._rest_rows:
            self._rest = 0
            return False
        self._rest -= 1
        return self._probe_seconds < self._next_probe

    def skips(self, seconds: float) -> bool:
        if self._rest % MEASURED_AT_REST == 0:
            return False
        self._probe_seconds += PROBE_SHARE * seconds
        return True

    def ask(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[int]:
        rows = self._asked_rows = len(requests)
        for request in requests:
            request.probes = False
        if not self.cost.knows(rows):
            return [0] * rows  # the next step shows what one without drafts takes
        counts = self._best(requests, limits, rows, extra=self.propose_seconds)
        if any(counts):
            self._num_drafted += 1
            if self._num_drafted % REFRESH_STEPS:
                return self._probe_more(requests, limits, counts)
            half = self._num_drafted // REFRESH_STEPS % 2
            return [(count + 1) // 2 * half for count in counts]
        self._rest, self._rest_rows = self._rest_size, rows
        self._rest_size = min(2 * self._rest_size, MOST_REST_STEPS)
        return self._probe(requests, limits)

    def grant(
        self, requests: Sequence[Request], limits: Sequence[int], num_rows: int, prompts: bool
    ) -> Sequence[int]:
        if num_rows <= self._asked_rows and not prompts:
            return limits  # as decided when they were asked for
        counts = self._best(requests, limits, num_rows, prompts=prompts)
        for index, request in enumerate(requests):
            if request.probes:
                counts[index] = limits[index]
        return counts

    def _best(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        rows: int,
        *,
        extra: float = 0.0,
        prompts: bool = False,
    ) -> list[int]:
        """rows: that sample. extra: seconds for each draft beside verifying it."""
        cost, counts = self.cost, [0] * len(requests)
        rates = [self.acceptance(request) for request in requests]
        slots = [(-rate, i) for i, rate in enumerate(rates) if limits[i] > 0]
        heapify(slots)
        expected, seconds, best, taken = float(rows), cost.seconds(rows), list(counts), 0
        best_rate, since_best = expected / max(seconds, 1e-9), 0
        each = self.costs.prompt_seconds(1, self.costs.mean_context) if prompts else 0.0
        while slots and since_best < LOOK_AHEAD:
            survival, index = -slots[0][0], slots[0][1]
            counts[index] += 1
            taken += 1
            expected += survival
            if counts[index] < limits[index]:
                heapreplace(slots, (-survival * rates[index], index))
            else:
                heappop(slots)
            seconds = seconds + each if each else max(seconds, cost.seconds(rows + taken))
            rate = expected / (seconds + taken * extra)
            since_best += 1
            if rate > best_rate:
                best, best_rate, since_best = list(counts), rate, 0
        return best

    def _probe(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[int]:
        """Now and then drafts for one request, the one that was tried longest ago."""
        counts, able = [0] * len(requests), [i for i, limit in enumerate(limits) if limit > 0]
        self._next_probe = self._probe_price(len(requests))
        if not able or self._probe_seconds < self._next_probe:
            return counts
        chosen = min(able, key=lambda i: requests[i].last_probe)
        counts[chosen] = min(self._probe_size, limits[chosen])
        self._probe_seconds = 0.0
        self._num_probes += 1
        requests[chosen].last_probe, requests[chosen].probes = self._num_probes, True
        return counts

    def _probe_more(
        self, requests: Sequence[Request], limits: Sequence[int], counts: Sequence[int]
    ) -> Sequence[int]:
        """Now and then more drafts than seem best, to measure what they cost."""
        more = [min(limit, count + 2) for count, limit in zip(counts, limits, strict=True)]
        taken, wider = sum(counts), sum(more)
        seconds = self.cost.seconds
        price = seconds(len(counts) + wider) - seconds(len(counts) + taken)
        price = max(0.0, price) + (wider - taken) * self.propose_seconds
        if wider == taken or self._probe_seconds < price:
            return counts
        self._probe_seconds = 0.0
        for request in requests:
            request.probes = True
        return more

    @property
    def _probe_size(self) -> int:
        """Small ones find out sooner, large ones measure what many drafts cost."""
        return min(self._most, (1, 2, self._most)[self._num_probes % 3])

    def _probe_price(self, num_rows: int) -> float:
        wider = self.cost.seconds(num_rows + self._probe_size) - self.cost.seconds(num_rows)
        return max(0.0, wider) + self._probe_size * self.propose_seconds
