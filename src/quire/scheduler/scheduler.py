"""Who computes which tokens, step by step.

A request is a list of tokens, of which the first `num_computed_tokens` have their keys and values in
blocks. Every step, the scheduler hands requests some of their tokens that are not computed yet,
until the token budget or the free blocks run out. That is all. A prompt being prefilled, in one
piece or in chunks, has many tokens to catch up with; a decoding request has one, the token it sampled
last; a prefix-cache hit starts with `num_computed_tokens` above zero; a preempted request goes
back to zero and catches up again. The scheduler does not distinguish them.

The executor carries plans out in order, so a plan may build on one that is still in flight, as if it
were done: what is planned counts as computed, blocks taken from one request may go to another at once,
and a token that is being sampled is in the list as *pending*, its id not known yet. What needs the id
waits until it is known: sharing the block that it fills, and ending the request with it. If it turns out to
be the last token, the result of the row planned after it is discarded.

A row may end in drafts, guesses at the tokens that follow (`scheduler/drafting.py`).

Four rules keep it fair and free of deadlock (docs/adr/0002-one-order.md):

* One order (the policy's) decides everything: who is admitted first, who gets budget first, and,
  read backwards, who is preempted. So the first of the running requests always advances.
* Every running request gets at least a quantum of budget per step, whatever is before it, and so does the
  head of the queue. The rest goes in order. (With a target for the time of a step, `scheduler/latency.py`.)
* A waiting request does not compute what one before it is about to compute. It waits and finds it.
* A waiting request is admitted only if all its known tokens fit beside what the running ones still
  need. Preemption is only for what cannot be known before: how long outputs become. If it is to be
  expected too soon, the request waits (`scheduler/worth.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from quire.kvcache import KVCacheManager, KVConnector, Misses, PrefixMatch
from quire.messages import (
    AddRequest,
    AdmittedRequest,
    BlockIds,
    FinishReason,
    PlannedRow,
    RequestUpdate,
    SampledRow,
    SchedulerStats,
    StepPlan,
    StepResult,
)
from quire.scheduler.adapters import AdapterPlaces
from quire.scheduler.cost_model import CostModel
from quire.scheduler.decisions import Observer, Reporter, Wait, WaitReason
from quire.scheduler.drafting import Drafting
from quire.scheduler.fitted import FittedCost
from quire.scheduler.latency import LatencyTarget
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.load import Load
from quire.scheduler.loading import Loading
from quire.scheduler.micro_batches import MicroBatches, least_share
from quire.scheduler.policy import create_policy
from quire.scheduler.queue import RequestQueue
from quire.scheduler.rates import Rates
from quire.scheduler.record import Recorder
from quire.scheduler.request import Request, RequestStatus, check_message
from quire.scheduler.sharing import Sharing
from quire.scheduler.stats import add_state
from quire.scheduler.worth import Worth

_HOLDS_KV = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION)
_LATE = (FinishReason.TIMEOUT, FinishReason.EXPIRED)


class Scheduler:
    """Plans steps and applies their results. One thread; no I/O; never imports torch."""

    def __init__(
        self,
        limits: SchedulerLimits,
        kv: KVCacheManager,
        *,
        clock: Callable[[], float] = time.monotonic,
        needs_token_before_next: Callable[[AddRequest], bool] = lambda message: False,
        takes_drafts: Callable[[AddRequest], bool] = lambda message: True,
        observe: Observer | None = None,
        record: Recorder | None = None,
        connector: KVConnector | None = None,
    ) -> None:
        """needs_token_before_next: says of a request that it cannot be overlapped, because its next token
        cannot be sampled, or its drafts be made, before this side has seen the last one.
        takes_drafts: says of a request that several of its tokens can be sampled in one step.
        observe: called with every decision.
        record: written in every step; its clock is used.
        connector: of stores outside the cache, if there are any."""
        if record is not None:
            clock = record.clock
        # A single request can always grow to full length: this guarantees progress.
        assert kv.blocks_for(limits.max_model_len) <= kv.num_usable
        assert limits.max_num_batched_tokens >= limits.max_num_seqs
        self.limits = limits
        self.kv = kv
        self.running = RequestQueue()
        self.waiting = create_policy(limits.policy, aging=limits.aging, clock=clock)
        self.requests: dict[int, Request] = {}
        self.sharing = Sharing(kv, self.requests)
        self.adapters = AdapterPlaces(limits.max_adapters)
        self.report = Reporter(
            observe, lambda request_id: self.waiting.standing(self.requests[request_id]), record
        )
        self._clock = clock
        self._needs_token_before_next = needs_token_before_next
        self._takes_drafts = takes_drafts
        self._step_id = 0
        self._micro_batches = MicroBatches(limits)
        self._released: list[int] = []
        self._waits: dict[int, Wait] = {}
        """By request id, for those that the last step considered; the others wait behind `_stopped_at`."""
        self._num_deferred = 0
        self._stopped_at: int | None = None
        self.costs = CostModel()
        if limits.cost_file:
            known = FittedCost.parse(limits.cost_file).seconds
            self.costs.start(known, rows=limits.max_num_seqs, tokens=limits.max_num_batched_tokens)
        self.drafting = Drafting(limits, kv, self.report, self.costs)
        self.rates = Rates()
        self.latency = LatencyTarget(limits, kv.block_size, self.report, self.costs)
        self.load = Load(limits, self.latency, self.rates, clock)
        self.worth = Worth(kv, self.costs, self.rates, connector)
        self.loading: Loading | None = None
        self._connector = connector
        if connector is not None:
            self.loading = Loading(kv, connector, self.costs, clock)
        self._misses = Misses(kv, None if self.loading is None else self.loading.transfers, clock)
        self._stats = SchedulerStats()
        self.record = record
        if record is not None:
            record.attach(self)

    # --- adding and ending requests ---------------------------------------------------------------

    def add_request(self, message: AddRequest) -> None:
        """Queue a request. The front end has validated it. Lengths are checked again because a request
        that can never fit would wait for ever."""
        if message.request_id in self.requests:
            raise ValueError(f"request id {message.request_id} is in use")
        check_message(message, self.limits.max_model_len)
        request = Request(
            message,
            queued_time=self._clock(),
            needs_token_before_next=self._needs_token_before_next(message),
            takes_drafts=self._takes_drafts(message),
        )
        if self.record is not None:
            self.record.add(request, message)
        request.sort_key = self.waiting.waiting_key(request)
        self.requests[request.request_id] = request
        self.waiting.add(request)
        self._waits[request.request_id] = Wait(WaitReason.ARRIVED)
        self.report.arrived(request.request_id)
        if self.loading is not None:
            self.loading.queued(request)

    def abort(
        self, request_ids: Iterable[int], reason: FinishReason = FinishReason.ABORT
    ) -> list[RequestUpdate]:
        """End requests now, waiting or running. Unknown ids (already finished) are ignored. reason: of those
        that are queued, `EXPIRED` becomes that of those that were admitted, `TIMEOUT`."""
        late = FinishReason.TIMEOUT if reason is FinishReason.EXPIRED else reason
        if self.record is not None:
            self.record.abort(request_ids := list(request_ids), reason)
        return [
            self._finish(request, late if request.has_run else reason)
            for request_id in request_ids
            if (request := self.requests.get(request_id)) is not None
        ]

    def reset_prefix_cache(self) -> None:
        """Drop all cached content. Requests keep their blocks, but no other request finds them."""
        if self.record is not None:
            self.record.reset()
        self.kv.reset_cache()
        if self.loading is not None:
            self.loading.transfers.reset()

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do (including sending releases to the executor)."""
        if self.loading is not None and self.loading.transfers.has_work:
            return True
        return bool(self.requests) or bool(self._released)

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step, as if those in flight were done. A plan without rows means that no request
        can run: there is none, or all wait for a pending token. Launch it only if none is in flight.

        The queue comes first: it gets what running requests do not want, and at least a quantum. They
        divide the rest: a quantum for each, and then in order what is left."""
        self._step_id += 1
        self._misses.step(self._step_id)
        plan = StepPlan(step_id=self._step_id)
        self._waits.clear()
        self._num_deferred, self._stopped_at = 0, None
        self.adapters.begin(self._step_id, self.requests)
        if self.loading is not None:
            self.loading.transfers.step_id = self._step_id
        running = list(self.running)
        if self.kv.has_windows:
            for request in running:  # drafts in flight may have to be computed again
                computed = request.num_computed_tokens - request.num_drafts_in_flight
                self.kv.slide(request.request_id, computed)
        wanted = self._wanted(running)
        budget, left_out = self._micro_batches.share(running, wanted, self.waiting)
        self._waits |= dict.fromkeys(left_out, Wait(WaitReason.SHARE))
        quantum = least_share(wanted, budget, self.kv.block_size)
        self.report.step(self._step_id, quantum, self.kv.num_free, budget)
        self.latency.begin(running, wanted)
        budget -= self._schedule_waiting(plan, max(quantum, budget - sum(wanted)))
        left_out = self.latency.divide(running, wanted)
        self._waits |= dict.fromkeys(left_out, Wait(WaitReason.TARGET))
        self._schedule_running(plan, running, wanted, budget, quantum)
        self.rates.begin(self._clock())
        if self.limits.max_drafts:
            self.drafting.plan(plan, self.requests)
        if plan.rows or not self._micro_batches.num_in_flight:
            self._micro_batches.launched(plan)
            plan.released, self._released = self._released, []
            if self.loading is not None:
                self.loading.transfers.take(plan)
        self.report.rows(running, wanted, self._waits, self._stopped_at, plan)
        self._advance(plan)
        return plan

    def _wanted(self, running: list[Request]) -> list[int]:
        """The number of tokens that each would compute in this step with the whole budget."""
        wanted = []
        for request in running:
            pending = request.num_pending_tokens
            count = len(request.token_ids) + pending - request.num_computed_tokens
            if count != 1:
                count = self._capped(count)
            if (pending or not request.generates) and self._is_idle(request):
                count = 0
            wanted.append(count)
        return wanted

    def _schedule_running(
        self, plan: StepPlan, running: list[Request], wanted: list[int], budget: int, quantum: int
    ) -> None:
        """Divide the budget, and preempt from the end of the order if blocks are lacking. The budget of a
        preempted request is not used."""
        spare = budget - sum(wanted) + sum(count - quantum for count in wanted if count > quantum)
        assert spare >= 0
        block_size = self.kv.block_size
        for request, count in zip(running, wanted, strict=True):
            if not count or request.status is not RequestStatus.RUNNING:
                continue
            if count == 1 and 0 < request.num_computed_tokens % block_size < block_size - 1:
                self._add_row(plan, request, 1, ())  # within a block: begins none, and fills none
                continue
            if count > quantum:
                count = min(count, quantum + spare)
                spare -= count - quantum
            growth = self.kv.grow(request.request_id, request.num_computed_tokens + count)
            while growth is None and not self._awaits_load(request):
                victim = self.running[len(self.running) - 1]
                self._preempt(victim, request, count)
                if victim is request:
                    break
                growth = self.kv.grow(request.request_id, request.num_computed_tokens + count)
            if growth is not None:
                self._plan_row(plan, request, count, growth.block_ids)

    def _awaits_load(self, request: Request) -> bool:
        """Whether the only running request lacks blocks that loads hold."""
        waits = len(self.running) == 1 and self.loading is not None and self.loading.is_under_way
        if waits:
            self._waits[request.request_id] = Wait(WaitReason.LOAD)
        return waits

    def _is_idle(self, request: Request) -> bool:
        """Whether the request has nothing to compute until the plans in flight are done."""
        if not request.num_pending_tokens:
            return request.num_computed_tokens == request.num_tokens  # it only has a prompt
        if request.ends_with_pending:
            return True
        if request.needs_token_before_next or self.drafting.holds(request):
            self._stats.rows_held += 1
            return True
        return self.limits.stages > 1

    def _advance(self, plan: StepPlan) -> None:
        """Count planned tokens as computed. Only at the end, because within the step their KV cannot be
        copied yet."""
        for row in plan.rows:
            request = self.requests[row.request_id]
            request.num_computed_tokens += row.num_tokens
            request.num_pending_tokens += row.samples

    def _schedule_waiting(self, plan: StepPlan, budget: int) -> int:
        """Admit waiting requests in order, until one does not fit. Returns the budget that they take.

        A request that fits does so beside all that running requests grow by in this step, so a step that
        admits does not preempt."""
        if not self.waiting or self._is_full(budget):
            return 0
        left = budget
        promised = sum(
            self.kv.num_missing(request.request_id, request.num_tokens) for request in self.running
        )
        leaders = [request for request in self.running if self._has_prompt_left(request)]
        for request in self.waiting.candidates():
            match = self.adapters.wait_of(request) or self.sharing.match(
                request, leaders, self._step_id
            )
            if isinstance(match, Wait):
                self._waits[request.request_id] = match
                self._num_deferred += 1
                continue
            keep_free = promised + (self.limits.watermark_blocks if self.running else 0)
            free = self.kv.num_free - keep_free
            match = self._fit(request, match, free)
            if self.loading is not None:
                fits = not isinstance(match, Wait)
                to_come = self.loading.blocks_to_come(request, free, fits=fits)
                if to_come is not None:
                    promised += to_come
                    self._waits[request.request_id] = Wait(WaitReason.LOAD)
                    self._num_deferred += 1
                    continue
            if isinstance(match, Wait):
                self._stop_at(request, replace(match, budget=left))
                break
            needed = request.num_tokens - match.num_tokens
            if needed > left and not self.limits.enable_chunked_prefill:
                self._stop_at(request, Wait(WaitReason.BUDGET, needed=needed, budget=left))
                break
            count = self.latency.admit(match.num_tokens, self._capped(min(needed, left)))
            if not count:
                self._stop_at(request, Wait(WaitReason.TARGET, needed=needed))
                break
            self._admit(plan, request, match, count)
            if count < needed:
                leaders.append(request)
            promised += self.kv.num_missing(request.request_id, request.num_tokens)
            left -= count
            if self._is_full(left):
                break
        return budget - left

    def _is_full(self, left: int) -> bool:
        """Whether nobody can be admitted, whoever is next."""
        if len(self.running) >= self.limits.max_num_seqs:
            wait = Wait(WaitReason.SEAT, budget=left)
        elif left <= 0:
            wait = Wait(WaitReason.BUDGET, needed=1)
        elif self.latency.is_used_up:
            wait = Wait(WaitReason.TARGET, needed=1)
        else:
            return False
        head = self.waiting.first()
        if head is not None and head.request_id in self._waits:  # it was passed over
            head = next((each for each in self.waiting if each.request_id not in self._waits), None)
        if head is not None:
            self._stop_at(head, wait)
        return True

    def _has_prompt_left(self, request: Request) -> bool:
        return request.num_tokens - request.num_computed_tokens > self.kv.block_size

    def _stop_at(self, request: Request, wait: Wait) -> None:
        """Admit no request from here on."""
        self._waits[request.request_id] = wait
        self._stopped_at = request.request_id

    def _fit(self, request: Request, match: PrefixMatch, free: int) -> PrefixMatch | Wait:
        """A match with which the request can be admitted, if necessary without the copied tail (which
        holds one more block for a moment), or why it waits. What is loaded for it is not given up again."""
        needed = self.kv.blocks_needed(match, request.num_tokens)
        if needed > free and match.tails:
            match = self.kv.without_tails(match)
            needed = self.kv.blocks_needed(match, request.num_tokens)
        if needed > free:
            return Wait(WaitReason.BLOCKS, needed=needed, free=free)
        if self.loading is not None and self.loading.has_begun(request.request_id):
            return match
        return self.worth.wait(request, self.running, free - needed) or match

    def _capped(self, count: int) -> int:
        threshold = self.limits.long_prefill_token_threshold
        return min(count, threshold) if threshold else count

    def _admit(self, plan: StepPlan, request: Request, match: PrefixMatch, count: int) -> None:
        miss = None
        load = self.loading.admitted(request, match) if self.loading is not None else None
        if request.prefix is not None:
            self.worth.returned(request.num_tokens, match.num_tokens, load)
        else:
            request.prefix = self._misses.report(request, match, load)
            request.scheduled_time = self._clock()
            miss = request.prefix.reason
            if self.kv.enable_prefix_caching:
                self._stats.prefix_queries += request.num_tokens
                self._stats.prefix_hits += request.prefix.device
        reach = match.num_tokens + count
        growth = self.kv.admit(request.request_id, match, request.cache_key, reach)
        self.waiting.remove(request)
        self.waiting.admitted(request, match.num_tokens)
        self.running.add(request)
        self.adapters.enter(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = match.num_tokens
        self._stats.blocks_copied += len(growth.copies)
        plan.copies.extend(growth.copies)
        plan.admitted.append(
            AdmittedRequest(
                request_id=request.request_id,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                block_ids=growth.block_ids,
                decoding=request.decoding,
                placement=request.placement,
                num_prompt_logprobs=request.num_prompt_logprobs,
            )
        )
        self._plan_row(plan, request, count, ())
        needed = request.num_tokens - match.num_tokens
        self.report.admitted(request.request_id, miss, needed, self.kv.num_free, count)

    def _plan_row(
        self, plan: StepPlan, request: Request, count: int, new_block_ids: BlockIds
    ) -> None:
        known = min(request.num_computed_tokens + count, len(request.token_ids))
        self.kv.register(request.request_id, request.token_ids, known, self._step_id)
        self._add_row(plan, request, count, new_block_ids)

    def _add_row(
        self, plan: StepPlan, request: Request, count: int, new_block_ids: BlockIds
    ) -> None:
        start, known = request.num_computed_tokens, len(request.token_ids)
        reach = start + count
        is_last = reach == known + request.num_pending_tokens
        plan.rows.append(
            PlannedRow(
                request_id=request.request_id,
                start=start,
                num_tokens=count,
                new_block_ids=new_block_ids,
                samples=1 if is_last and request.generates else 0,
                pending=reach > known,
            )
        )

    def _preempt(self, request: Request, for_whom: Request, count: int) -> None:
        """Free the request's blocks, since `for_whom` (perhaps itself) lacks some for `count` more
        tokens. Resuming is a prefix-cache walk, and recompute of the rest. A pending token stays valid:
        it depends on the tokens before it, not on where their KV was."""
        reach = for_whom.num_computed_tokens + count
        needed = self.kv.num_missing(for_whom.request_id, reach)
        cost = self.worth.resume_seconds(request.num_tokens)
        wait = Wait(WaitReason.PREEMPTED, for_whom.request_id, needed, self.kv.num_free, cost=cost)
        self._waits[request.request_id] = wait
        self.report.preempted(request.request_id, wait)
        self._stop(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.draft_token_ids = ()
        request.num_preemptions += 1
        self._stats.num_preemptions += 1
        self.waiting.add(request)

    def _stop(self, request: Request, *, keep_tail: bool = True) -> None:
        """Free a running request's blocks. They stay in the prefix cache, the partial one too."""
        self.running.remove(request)
        self.waiting.stopped(request)
        self.adapters.leave(request)
        if self.loading is not None and keep_tail:
            self.loading.transfers.left(request.request_id)
        known = request.token_ids[: request.num_computed_tokens] if keep_tail else ()
        place = request.placement
        self.kv.release(request.request_id, known, step_id=self._step_id, placement=place)
        self._released.append(request.request_id)

    # --- results ----------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        """Apply the result of a step. Requests that have ended meanwhile are skipped."""
        if self.record is not None:
            self.record.result(result)
        self._micro_batches.done(plan)
        updates = self._loads_ended(result) if result.transferred else []
        sampled = {row.request_id: row for row in result.sampled}
        for row in plan.rows:
            request, found = self.requests.get(row.request_id), sampled.get(row.request_id)
            if request is None:
                self._stats.rows_discarded += row.samples > 0
            elif row.samples:
                assert found is not None
                updates.append(self._learn(request, row, found))
            elif found is not None or not request.generates:
                updates += self._learn_of_prompt(request, row, found)
        self._stats.step_tokens += plan.num_tokens
        seconds = self.rates.end(plan, self._clock(), is_idle=not self.requests)
        self.costs.measure(plan, seconds)
        if self.limits.max_drafts and plan.rows:
            self.drafting.measure(plan, self.requests, result.draft_seconds, seconds)
            if self.latency.target:
                self.latency.num_drafts = sum(len(row.draft_token_ids) for row in plan.rows)
        return updates

    def _loads_ended(self, result: StepResult) -> list[RequestUpdate]:
        assert self.loading is not None
        updates = []
        for request_id in self.loading.finish(result.transferred):
            request = self.requests[request_id]
            if not self.limits.fails_with_loads or request.prefix is not None:
                continue  # what a preempted request has lost is computed again
            update = self._finish(request, FinishReason.ERROR)
            update.error = (
                "The KV of its prompt could not be loaded (kv_load_failure_policy: fail)."
            )
            updates.append(update)
        return updates

    def _learn(self, request: Request, planned: PlannedRow, row: SampledRow) -> RequestUpdate:
        request.num_pending_tokens -= planned.samples
        prompt_logprobs = None
        if row.prompt_logprobs is not None:
            prompt_logprobs = request.news_of_prompt(row.prompt_logprobs)
        if row.error is not None:
            update = self._finish(request, FinishReason.ERROR)
            update.error, update.prompt_logprobs = row.error, prompt_logprobs
            return update
        first = len(request.token_ids) == request.num_prompt_tokens
        drafts, verified, kept = planned.draft_token_ids, None, 0
        if drafts:
            verified = self.drafting.learn(request, planned, row.token_ids)
        accepted = request.append_tokens(row.token_ids)
        if drafts and request.status is RequestStatus.RUNNING:
            reach = min(request.num_computed_tokens, len(request.token_ids))
            self.kv.register(request.request_id, request.token_ids, reach, self._step_id)
        if request.finish_reason is not None:
            update = self._finish(request, request.finish_reason)
            update.stop_token = request.stop_token
        else:
            update = RequestUpdate(request_id=request.request_id)
            known = len(request.token_ids)
            if request.num_computed_tokens >= known and not known % self.kv.block_size:
                # Its last block is filled by a plan in flight.
                self.kv.register(request.request_id, request.token_ids, known, self._step_id)
            if row.draft_token_ids:
                kept = self.drafting.keep(request, row)
        is_odd = len(row.token_ids) != 1 or drafts or kept or prompt_logprobs is not None
        if is_odd and self.record is not None:
            self.record.learned(
                request, planned, row, len(accepted), verified, kept, prompt_logprobs
            )
        update.new_token_ids = accepted
        if row.logprobs is not None:
            update.logprobs = row.logprobs[: len(accepted)]
        if is_odd:
            update.drafts, update.prompt_logprobs = verified, prompt_logprobs
        if first:
            update.prefix, update.times = request.prefix, request.times
        return update

    def _learn_of_prompt(
        self, request: Request, row: PlannedRow, found: SampledRow | None
    ) -> list[RequestUpdate]:
        """Result of a non-sampling row: prompt logprobs, an embedding, or completion of a prompt-only
        request."""
        done = not request.generates and row.start + row.num_tokens == request.num_prompt_tokens
        if found is not None and found.error is not None:
            update = self._finish(request, FinishReason.ERROR)
            update.error = found.error
            return [update]
        news = None
        if found is not None and found.prompt_logprobs is not None:
            news = request.news_of_prompt(found.prompt_logprobs)
        if not done and news is None:
            return []
        if self.record is not None and found is not None and news is not None:
            self.record.learned(request, row, found, 0, None, 0, news)
        update = RequestUpdate(request_id=request.request_id)
        if done:
            update = self._finish(request, FinishReason.LENGTH)
            update.prefix, update.times = request.prefix, request.times
            update.embedding = None if found is None else found.embedding
        update.prompt_logprobs = news
        return [update]

    def _finish(self, request: Request, reason: FinishReason) -> RequestUpdate:
        kv_source = None
        if request.status is RequestStatus.RUNNING:
            self.rates.ended()
            if request.hold_kv and self.loading is not None and reason in _HOLDS_KV:
                kv_source = self.loading.transfers.hold(request.request_id)
            self._stop(request, keep_tail=reason is not FinishReason.ERROR)
        else:
            self.waiting.remove(request)
            wait = self._waits.pop(request.request_id, None)
            self._num_deferred -= wait is not None and wait.reason.label == "deferred"
        if self.loading is not None:
            self.loading.ended(request.request_id)
        self.waiting.ended(request)
        self.report.finished(request.request_id, reason)
        self.kv.forget(request.request_id)
        del self.requests[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        return RequestUpdate(
            request_id=request.request_id,
            finish_reason=reason,
            num_preemptions=request.num_preemptions,
            kv_source=kv_source,
            times=request.times if reason in _LATE else None,
        )

    # --- accounting -------------------------------------------------------------------------------

    def take_stats(self) -> SchedulerStats:
        """The current state, and counts since the last call."""
        if self.record is not None:
            self.record.stats()
        stats, self._stats = self._stats, SchedulerStats()
        stats.drafts, stats.tenants = self.drafting.take_counts(), self.waiting.take_tenants()
        add_state(stats, self.kv, self.running, self.waiting, self._num_deferred, self._connector)
        stopped = None if self._stopped_at is None else self._waits.get(self._stopped_at)
        stats.load = self.load.now(stats, self.running, self.waiting, stopped)
        return stats

    def why_waits(self, request: Request) -> Wait:
        """Why a waiting request did not run in the last step."""
        behind = Wait(WaitReason.BEHIND, self._stopped_at)
        return self._waits.get(request.request_id, behind)
