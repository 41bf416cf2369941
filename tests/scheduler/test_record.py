"""The record of decisions: reading gives what an observer saw, and a replay decides the same."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import settings

from quire.scheduler import DecisionLog
from quire.scheduler.record import Recorder
from quire.scheduler.record_reader import read
from tests.scheduler.test_scheduler_properties import SchedulerMachine


def seen(decisions):
    """As the record has them: tenants are hashes."""
    return [replace(each, tenant=None, reason=each.reason) for each in decisions]


class RecordedMachine(SchedulerMachine):
    """A random life with a record, and with a `DecisionLog` beside it."""

    def make_recorder(self):
        self.log = DecisionLog(most=10**6)
        self.plans = []
        ticks = itertools.count()
        return Recorder(clock=lambda: next(ticks) * 0.25, salt=b"salt")

    def observe(self, decision):
        super().observe(decision)
        self.log(decision)

    def check_plan(self, plan):
        super().check_plan(plan)
        self.plans.append(plan)

    def check_shares(self, plan, rows):
        pass  # of a step with a target for its time

    def teardown(self):
        super().teardown()
        if not hasattr(self, "scheduler"):
            return
        history = read(self.recorder.dump())
        decisions = [decision for step in history.steps for decision in step.decisions]
        if history.steps:
            assert seen(decisions) == seen(self.log)
        launched = [step for step in history.steps if step.done is not None]
        assert len(launched) == len(self.plans)
        for step, plan in zip(launched, self.plans, strict=True):
            assert step.step_id == plan.step_id
            assert [
                (row.request_id, row.start, row.num_tokens, row.samples, row.num_drafts)
                for row in step.rows
            ] == [
                (
                    row.request_id,
                    row.start,
                    row.num_tokens,
                    row.samples,
                    len(row.draft_token_ids),
                )
                for row in plan.rows
            ]
        for request_id, tokens in self.outputs.items():
            accepted = sum(
                row.num_accepted
                for step in history.steps
                for row in step.rows
                if row.request_id == request_id
            )
            assert accepted == len(tokens)
            end = history.ends[request_id]
            assert end.reason is self.finished[request_id]
            assert end.num_output_tokens == len(tokens)


TestRecorded = RecordedMachine.TestCase
TestRecorded.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
