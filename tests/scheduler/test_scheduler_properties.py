"""Random lives of the scheduler, with every invariant checked at every step, and with none, one or two plans
in flight while the next one is made."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.engine.core import EngineCore
from quire.kvcache import KVCacheManager
from quire.kvcache.retention import Retention
from quire.messages import (
    AbortRequests,
    AddRequest,
    Control,
    FinishReason,
    ResetPrefixCache,
    StepOutputs,
)
from quire.placement import Placement
from quire.scheduler import DecisionKind, Scheduler, SchedulerLimits, WaitReason
from quire.scheduler.invariants import check_invariants
from quire.scheduler.request import RequestStatus
from tests.scheduler.fake_executor import CheckingExecutor, expected_output
from tests.scheduler.requests import add_request

EOS = 7
WEIGHTS = {"a": 1.0, "b": 3.0}
VOCAB = 9  # small, so that prompts share prefixes and EOS is common


def needs_token_before_next(message: AddRequest) -> bool:
    return message.placement.priority == 2


def draft(tokens, seed):
    """None to five tokens, the first of which are often right."""
    right = expected_output(list(tokens), seed, 5, vocab_size=VOCAB)
    number = sum(tokens) + 7 * len(tokens)
    good = right[: number % 6]
    return (good + [number % VOCAB] * 2)[: number * 5 % 6]


def known_tokens(row):
    return row.num_tokens - len(row.draft_token_ids)


class SchedulerMachine(RuleBasedStateMachine):
    max_in_flight = 1
    stages = 1
    max_model_len = 24
    policy: str | None = None
    """None: one of those that there are."""
    aging = 0.0
    itl_target = 0.0
    drafts = False
    layouts: tuple[tuple[int | None, ...], ...] = ((None,),)
    """Windows of the groups of layers, one of these."""
    fails_with_loads = False
    ends_early: tuple[FinishReason, ...] = (FinishReason.ABORT,)

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        spare_blocks=st.integers(0, 30),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 20),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        chunked=st.booleans(),
        threshold=st.sampled_from([0, 0, 3]),
        watermark=st.integers(0, 3),
        layout=st.integers(0, 11),
    )
    def set_up(
        self, block_size, spare_blocks, max_num_seqs, extra_budget, caching, policy, chunked,
        threshold, watermark, layout,
    ):  # fmt: skip
        budget = max_num_seqs + extra_budget
        if not chunked:
            budget = max(budget, self.max_model_len)
        limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=self.max_model_len,
            watermark_blocks=watermark,
            long_prefill_token_threshold=threshold if chunked else 0,
            enable_chunked_prefill=chunked,
            policy=self.policy or policy,
            aging=self.aging,
            max_drafts=5 if self.drafts else 0,
            adaptive_drafts=watermark == 1,
            stages=self.stages,
            least_prompt_tokens=2,
            itl_target=self.itl_target if chunked else 0.0,
            fails_with_loads=self.fails_with_loads,
        )
        windows = self.layouts[layout % len(self.layouts)]
        sizes = {"windows": windows, "max_row_tokens": budget, "enable_prefix_caching": caching}
        most = KVCacheManager(2, block_size, **sizes).blocks_for(self.max_model_len)
        num_blocks = 1 + most + spare_blocks
        self.recorder = self.make_recorder()
        sizes["retention"] = Retention.of_blocks(
            num_blocks - 1,
            0.5,
            len(windows),
            (lambda: self.now) if self.recorder is None else self.recorder.clock,
        )
        kv = KVCacheManager(num_blocks, block_size, **sizes)
        self.scheduler = Scheduler(
            limits,
            kv,
            clock=iter(range(10**6)).__next__,
            needs_token_before_next=needs_token_before_next,
            connector=self.make_connector(),
            observe=self.observe,
            record=self.recorder,
        )
        if watermark == 2:
            self.scheduler.worth.least_steps = 2.0
        executor = self.make_executor(
            num_blocks,
            block_size,
            vocab_size=VOCAB,
            max_in_flight=self.max_in_flight,
            on_plan=self.check_plan,
            windows=windows,
            drafter=draft if self.drafts else lambda tokens, seed: [],
        )
        self.core = EngineCore(self.scheduler, executor, clock=lambda: 0.0)
        self.limits, self.now = limits, 0.0
        self.next_id = 1
        self.messages: dict[int, AddRequest] = {}
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, FinishReason] = {}
        self.prompts: list[list[int]] = []
        self.deferred: set[int] = set()
        self.passed_over: dict[int, int] = {}
        self.charged: Counter[str] = Counter()
        self.computed: dict[int, tuple[int, set[int]]] = {}
        """Of each request, the first position that it computed, and all of them."""

    def observe(self, decision):
        if decision.kind is DecisionKind.STEP:
            self.budget = decision.budget

    def make_connector(self):
        return None

    def make_recorder(self):
        return None

    def make_executor(self, *sizes, **options):
        return CheckingExecutor(*sizes, **options)

    def transfers_of(self, data):
        """Where a new request's KV is, and whether another will fetch it from here."""
        return {}

    def retains(self, data):
        return ()

    def fresh_prompts(self):
        return st.lists(st.integers(0, 1), min_size=1, max_size=self.max_model_len - 1)

    @rule(
        data=st.data(),
        priority=st.integers(-2, 2),
        tenant=st.sampled_from("aab"),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        salt=st.sampled_from([None, None, "a"]),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 3),
    )
    def add(self, data, priority, tenant, n, salt, ignore_eos, min_tokens):
        known = [self.fresh_prompts()] + ([st.sampled_from(self.prompts)] if self.prompts else [])
        prompt = data.draw(st.one_of(known))
        self.prompts.append(prompt)
        max_tokens = data.draw(st.integers(1, self.max_model_len - len(prompt)))
        leader, retain = self.next_id, self.retains(data)
        for index in range(n):
            message = add_request(
                self.next_id,
                prompt,
                seed=index,
                max_tokens=max_tokens,
                min_tokens=min(min_tokens, max_tokens),
                end_token_ids=frozenset(() if ignore_eos else (EOS,)),
                arrival_time=float(leader),
                placement=Placement(
                    priority=priority,
                    tenant=tenant,
                    weight=WEIGHTS[tenant],
                    cache_salt=salt,
                    retain=retain,
                ),
                fork_of=leader if index else None,
                **self.transfers_of(data),
            )
            self.messages[self.next_id] = message
            self.outputs[self.next_id] = []
            assert self.core.handle(message) is None
            self.next_id += 1

    @rule(data=st.data())
    @precondition(lambda self: getattr(self, "scheduler", None) and self.scheduler.requests)
    def abort(self, data):
        chosen = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.record(self.core.handle(AbortRequests([chosen, 10**9])))

    @rule()
    def reset_cache(self):
        self.core.handle(Control(0, ResetPrefixCache()))

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.step_once()

    def step_once(self):
        first = self.first_in_order()
        before = first and (len(first.token_ids), first.num_computed_tokens)
        self.was_running = list(self.scheduler.running)
        self.wanted = {r.request_id: self.wants(r) for r in self.was_running}
        singles = [
            r
            for r in self.was_running
            if (r.num_pending_tokens and not r.ends_with_pending) or self.wanted[r.request_id] == 1
        ]
        self.most_rows = -(-len(singles) // self.stages)
        self.must_admit = self.head_that_fits()
        self.record(self.core.step())
        check_invariants(self.scheduler)
        if first is not None and self.max_in_flight <= 2:  # deeper, it may wait for two results
            after = (len(first.token_ids), first.num_computed_tokens)
            assert after > before or first.request_id in self.finished or self.awaits_load(first), (
                "the first did not advance"
            )

    def check_plan(self, plan):
        """Between planning a step and carrying it out."""
        check_invariants(self.scheduler)
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert plan.rows or not self.core._in_flight, "it occupies a place in the pipeline"
        assert len(plan.rows) <= self.limits.max_num_seqs
        rows = {row.request_id: row for row in plan.rows}
        assert len(rows) == len(plan.rows)
        for row in plan.rows:
            computed = self.computed.setdefault(row.request_id, (row.start, set()))[1]
            computed.update(range(row.start, row.start + row.num_tokens))
        assert rows.keys() <= {request.request_id for request in self.scheduler.running}
        for request in self.scheduler.running:
            row = rows.get(request.request_id)
            if row is None:
                waits = self.has_to_wait(request) or self.is_passed_over(request, plan)
                assert waits, "a running request got no token"
            else:
                self.check_row(row, request)
                self.passed_over.pop(request.request_id, None)
        for request in self.scheduler.waiting:
            if self.scheduler.why_waits(request).reason.label == "deferred":
                self.deferred.add(request.request_id)
            self.check_reason(plan, request)
        if any(request.status is RequestStatus.PREEMPTED for request in self.was_running):
            assert not plan.admitted, "a step that preempts admits nobody"
        else:
            self.check_shares(plan, rows)

    def check_shares(self, plan, rows):
        """Of a step that preempts nobody: who is sure of what, and that nothing is left over."""
        num_tokens = sum(map(known_tokens, plan.rows))
        quantum, wanted = self.least_quantum(), dict(self.wanted)
        for request_id in self.passed_over:
            wanted.pop(request_id, None)
        head = self.must_admit
        if head is not None and self.why_waits(head) is WaitReason.COST:
            head = None
        assert head is None or head.request_id in rows, "the head of the queue was not admitted"
        for message in plan.admitted:
            row = rows[message.request_id]
            wanted[message.request_id] = self.capped(len(message.token_ids) - row.start)
            request = self.scheduler.requests[message.request_id]
            report = request.prefix
            assert report.cached + report.computed == request.num_prompt_tokens
            assert request.num_preemptions or row.start == report.cached
        for request_id, most in wanted.items():
            got = known_tokens(rows[request_id]) if request_id in rows else 0
            assert got <= most
            if request_id in self.wanted or (head and request_id == head.request_id):
                assert got >= min(most, quantum), "less than a quantum"
            if num_tokens < self.budget:
                assert got == most, "budget is left"
        if num_tokens < self.budget:
            head = self.head_that_fits()
            assert head is None or self.why_waits(head) is WaitReason.COST, (
                "budget is left, and a seat and blocks"
            )

    def check_reason(self, plan, request):
        """Why it waits is true, as far as that can still be seen after planning."""
        scheduler = self.scheduler
        wait = scheduler.why_waits(request)
        other = scheduler.requests.get(wait.because_of)
        preempts = any(r.status is RequestStatus.PREEMPTED for r in self.was_running)
        match wait.reason:
            case WaitReason.SEAT:
                assert preempts or len(scheduler.running) == self.limits.max_num_seqs
            case WaitReason.BLOCKS:
                assert wait.needed > wait.free
                most = scheduler.kv.blocks_for(self.limits.max_model_len)
                assert scheduler.running or scheduler.loading.is_under_way
                assert wait.needed <= most + len(scheduler.kv.windows)
            case WaitReason.COST:
                assert preempts or other in scheduler.running
                assert other.sort_key < request.sort_key and 0 <= wait.gain < 1.5 * wait.cost
            case WaitReason.BUDGET if wait.needed > 1:
                assert wait.needed > wait.budget and not self.limits.enable_chunked_prefill
            case WaitReason.BUDGET:
                assert preempts or sum(map(known_tokens, plan.rows)) == self.budget
            case WaitReason.BEHIND:
                stopped = scheduler.why_waits(other).reason
                stops = (WaitReason.SEAT, WaitReason.BLOCKS, WaitReason.BUDGET, WaitReason.COST)
                assert stopped in stops
                if self.limits.policy == "fair":
                    assert other.was_admitted or not request.was_admitted
                else:
                    assert other.sort_key < request.sort_key
            case WaitReason.PREEMPTED:
                assert request.status is RequestStatus.PREEMPTED and wait.needed > wait.free
                assert other is request or other.sort_key < request.sort_key
            case WaitReason.PREFIX:
                size = scheduler.kv.block_size
                assert preempts or other in scheduler.running
                assert other.token_ids[:size] == request.token_ids[:size]
            case WaitReason.FORK:
                assert preempts or other in scheduler.running
                assert wait.because_of == request.fork_of
            case WaitReason.TOKEN:
                assert request.num_pending_tokens
            case WaitReason.LOAD:
                assert scheduler.loading.is_under_way
            case _:
                raise AssertionError(wait)

    def why_waits(self, request):
        return self.scheduler.why_waits(request).reason

    def capped(self, count):
        return min(count, self.limits.long_prefill_token_threshold or count)

    def wants(self, request):
        if self.has_to_wait(request):
            return 0
        return self.capped(request.num_tokens - request.num_computed_tokens)

    def least_quantum(self):
        """An equal part of a quarter of the step, in whole blocks: what others leave makes it more."""
        prompts = sum(wanted > 1 for wanted in self.wanted.values())
        share = (self.budget - (len(self.wanted) - prompts)) // 4
        part = share // max(1, prompts)
        return part - part % self.scheduler.kv.block_size or max(1, part)

    def head_that_fits(self):
        """The head of the queue, if it has to be admitted: there is a seat, its blocks are free even if the
        cache holds nothing for it, and it has no reason to wait for a prefix."""
        scheduler = self.scheduler
        if not scheduler.waiting or len(scheduler.running) >= self.limits.max_num_seqs:
            return None
        head = next(scheduler.waiting.candidates())
        if not self.limits.enable_chunked_prefill or self.may_be_deferred(head):
            return None  # whole, it may be too long for what is left of the budget
        kv = scheduler.kv
        promised = sum(
            kv.num_missing(request.request_id, request.num_tokens) for request in scheduler.running
        )
        keep_free = promised + (self.limits.watermark_blocks if scheduler.running else 0)
        fits = kv.blocks_for(head.num_tokens) + keep_free <= kv.pool.num_free
        return head if fits else None

    def may_be_deferred(self, request):
        if request.num_pending_tokens:
            return True
        leader = self.scheduler.requests.get(request.fork_of)
        if leader is not None and leader.status is RequestStatus.RUNNING:
            return True
        size = self.scheduler.kv.block_size
        return self.scheduler.kv.enable_prefix_caching and any(
            other.token_ids[:size] == request.token_ids[:size]
            and other.cache_key == request.cache_key
            and other.sort_key < request.sort_key
            for other in self.scheduler.running
        )

    def check_row(self, row, request):
        reach = row.start + row.num_tokens
        assert row.num_tokens >= 1 and request.num_computed_tokens == reach
        known = row.start + known_tokens(row)
        assert row.samples in (0, 1 + len(row.draft_token_ids))
        assert (row.samples > 0) == (known == request.num_tokens - row.samples)
        assert row.pending == (known > len(request.token_ids))
        if row.pending:
            assert self.max_in_flight > 1 and row.num_tokens == 1 and row.samples
            assert not needs_token_before_next(self.messages[row.request_id])
        if row.draft_token_ids:
            assert not row.pending and (
                request.num_output_tokens + row.samples <= request.decoding.max_tokens
            )
        if self.limits.long_prefill_token_threshold:
            assert known_tokens(row) <= self.limits.long_prefill_token_threshold

    def has_to_wait(self, request):
        """Whether nothing can be computed before a result in flight is there."""
        message = self.messages[request.request_id]
        last = len(message.prompt_token_ids) + message.decoding.max_tokens
        ends = request.num_tokens == last
        held = needs_token_before_next(message) or self.scheduler.drafting.holds(request)
        return request.num_pending_tokens and (ends or held or self.stages > 1)

    def awaits_load(self, request):
        """Whether it runs alone, and loads hold the blocks that it lacks."""
        reason = self.scheduler.why_waits(request).reason
        return reason is WaitReason.LOAD and list(self.scheduler.running) == [request]

    def is_passed_over(self, request, plan):
        """Whether a later plan has room for it, and soon."""
        if self.awaits_load(request):
            assert self.scheduler.loading.is_under_way
            self.passed_over[request.request_id] = 0
            return True
        if self.scheduler.why_waits(request).reason is not WaitReason.SHARE:
            return False
        times = self.passed_over[request.request_id] = (
            self.passed_over.get(request.request_id, 0) + 1
        )
        assert times < 2 * self.stages, "it starves"
        assert self.wanted[request.request_id] == 1
        return len(plan.rows) >= self.most_rows

    def first_in_order(self):
        """The request that must advance: the first in order that runs, and under fcfs the first of
        all (a newcomer with a better priority may have to wait for a seat). But who was overtaken while it
        waited for a prefix may have to wait for room."""
        running = list(self.scheduler.running)[:1]
        waiting = list(self.scheduler.waiting)[:1] if self.limits.policy == "fcfs" else []
        if running and waiting and waiting[0].request_id in self.deferred:
            waiting = []
        return min(running + waiting, key=lambda request: request.sort_key, default=None)

    def record(self, outputs):
        assert isinstance(outputs, StepOutputs)
        for tenant, stats in outputs.stats.tenants.items():
            self.charged[tenant] += stats.charged
        for update in outputs.updates:
            assert update.request_id not in self.finished, "an update after the end"
            self.outputs[update.request_id] += update.new_token_ids
            if update.finish_reason is not None:
                self.finished[update.request_id] = update.finish_reason

    @invariant()
    def consistent(self):
        if not hasattr(self, "scheduler"):
            return
        check_invariants(self.scheduler)
        live = set(self.scheduler.requests)
        assert live | set(self.finished) == set(self.messages)
        assert not live & set(self.finished)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if not self.core.has_work:
                break
            self.step_once()
        assert not self.core.has_work, "not everybody finished"
        pool = self.scheduler.kv.pool
        assert pool.num_free == pool.num_usable, "a block leaked"
        for request_id, message in self.messages.items():
            self.check_output(request_id, message)
        if self.limits.policy == "fair":
            self.check_charges()

    def check_charges(self):
        """1 for each prompt token that was computed, however often, 2 for each that was generated."""
        units = Counter()
        for request_id, (first, computed) in self.computed.items():
            message = self.messages[request_id]
            end = len(message.prompt_token_ids)
            prompt = sum(first <= position < end for position in computed)
            paid = prompt * (message.fork_of is None) + 2 * len(self.outputs[request_id])
            units[message.placement.tenant] += paid
        assert units == self.charged

    def check_output(self, request_id, message):
        decoding = message.decoding
        tokens = list(message.prompt_token_ids)
        full = expected_output(tokens, decoding.seed, decoding.max_tokens, vocab_size=VOCAB)
        expected, reason = full, FinishReason.LENGTH
        for index, token in enumerate(full):
            if token in decoding.end_token_ids and index + 1 >= decoding.min_tokens:
                expected, reason = full[: index + 1], FinishReason.STOP
                break
        output = self.outputs[request_id]
        if self.finished[request_id] in self.ends_early:
            assert output == expected[: len(output)]
        else:
            assert output == expected
            assert self.finished[request_id] is reason


class OverlappedMachine(SchedulerMachine):
    max_in_flight = 2


class DeeperMachine(SchedulerMachine):
    max_in_flight = 3


class LongPromptMachine(OverlappedMachine):
    """Prompts of many steps, most of which have nothing in common."""

    max_model_len = 160

    def fresh_prompts(self):
        length = st.integers(1, self.max_model_len - 30)
        return st.builds(lambda token, length: [token] * length, st.integers(0, 50), length)


class DraftMachine(SchedulerMachine):
    drafts = True


class OverlappedDraftMachine(OverlappedMachine):
    drafts = True


class WindowMachine(SchedulerMachine):
    layouts = ((None, 5), (None, 3, 3), (4,), (2, 7), (1, None), (None, 16, 2))
    drafts = True


class OverlappedWindowMachine(WindowMachine):
    max_in_flight = 2


class LongWindowMachine(LongPromptMachine):
    layouts = ((None, 20), (33,), (None, 7, 40))


class PipelineMachine(SchedulerMachine):
    max_in_flight = stages = 2


class PipelineOfThreeMachine(SchedulerMachine):
    max_in_flight = stages = 3


class LongPipelineMachine(LongPromptMachine):
    max_in_flight = stages = 4
    drafts = True


TestScheduler = SchedulerMachine.TestCase
TestDrafts = DraftMachine.TestCase
TestOverlappedDrafts = OverlappedDraftMachine.TestCase
TestOverlapped = OverlappedMachine.TestCase
TestDeeper = DeeperMachine.TestCase
TestLongPrompts = LongPromptMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestOverlapped.settings = TestScheduler.settings
TestWindows = WindowMachine.TestCase
TestOverlappedWindows = OverlappedWindowMachine.TestCase
TestLongWindows = LongWindowMachine.TestCase
TestWindows.settings = settings(TestScheduler.settings, max_examples=80)
TestOverlappedWindows.settings = settings(TestScheduler.settings, max_examples=50)
TestLongWindows.settings = settings(TestScheduler.settings, max_examples=30)
TestDrafts.settings = settings(TestScheduler.settings, max_examples=80)
TestOverlappedDrafts.settings = settings(TestScheduler.settings, max_examples=50)
TestLongPrompts.settings = settings(TestScheduler.settings, max_examples=50)
TestPipeline = PipelineMachine.TestCase
TestPipelineOfThree = PipelineOfThreeMachine.TestCase
TestLongPipeline = LongPipelineMachine.TestCase
TestPipeline.settings = settings(TestScheduler.settings, max_examples=80)
TestPipelineOfThree.settings = settings(TestScheduler.settings, max_examples=50)
TestLongPipeline.settings = settings(TestScheduler.settings, max_examples=50)
TestDeeper.settings = settings(TestScheduler.settings, max_examples=30)
