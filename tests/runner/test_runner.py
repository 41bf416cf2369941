"""The runner over a scripted backend: what it asks of one, and what it makes of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from quire.attention.base import KVCache
from quire.decoding import Decoding, TokenRules
from quire.messages import AdmittedRequest, PlannedRow, SampledRow, StepPlan, TokenLogprobs
from quire.runner.backend import StepInput, StepSamples
from quire.runner.prompt_work import PromptWork, score
from quire.runner.runner import NAN_ERROR, Runner
from quire.runner.seats import Seats, independent
from quire.sampling_params import PoolingParams
from quire.structured.base import NoTokenLeftError

VOCAB = 50
NAN = -1
TokenScript = Callable[[int, int], int]
"""(seat, position) -> token, or NAN."""


@dataclass
class Launched:
    backend: ScriptedBackend
    step: StepInput
    logprobs: bool

    def wait(self) -> StepSamples:
        """As late as it may be: with masks made at the launch."""
        pairs = zip(self.step.sample_seats.tolist(), self.step.positions.tolist(), strict=True)
        tokens = np.array([self.backend.script(*pair) for pair in pairs], dtype=np.int64)
        entries = {
            i: TokenLogprobs(token, 0.0, 1, [], [])
            for i, token in enumerate(tokens.tolist())
            if self.logprobs and token != NAN
        }
        return StepSamples(np.maximum(tokens, 0), tokens != NAN, entries, ())


@dataclass
class ScriptedBackend:
    script: TokenScript
    logprobs: bool = False
    calls: list[Any] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def open_cache(self, kv_cache: KVCache, seats: Seats) -> None:
        self.seats = seats

    def admit(self, seat: int, request: AdmittedRequest) -> None:
        self.calls.append(("admit", request.request_id))

    def release(self, seat: int) -> None:
        self.calls.append("release")

    score = staticmethod(score)

    def append(self, seat: int, token_ids: Sequence[int]) -> None:
        self.calls.append(("force", list(token_ids)))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.calls.append(("copy", list(pairs)))

    def launch(self, step: StepInput) -> Launched:
        self.calls.append("launch")
        rows = step.rows.rows[: step.rows.num_rows]
        self.steps.append(
            {
                "rows": rows[:, 1:].tolist(),
                "samples": step.sample_rows.tolist(),
                "positions": step.positions.tolist(),
                "ids": [
                    step.rows.token_ids[seat, start : start + count].tolist()
                    for seat, start, count, _ in rows.tolist()
                ],
                "masks": step.masks(),
            }
        )
        assert step.rows.num_wanted == rows[:, 3].sum()
        return Launched(self, step, self.logprobs)

    def prepare(self) -> bool:
        return False


def runner_of(script: TokenScript, **options: Any) -> tuple[Runner, ScriptedBackend]:
    backend = ScriptedBackend(script, **options)
    model = SimpleNamespace(
        spec=SimpleNamespace(vocab_size=VOCAB, kv=SimpleNamespace(groups=(None,)))
    )
    runner = Runner(model, backend, max_num_seqs=4)  # type: ignore[arg-type]
    runner.open_cache(SimpleNamespace(block_size=16), 64)  # type: ignore[arg-type]
    return runner, backend


def admitted(request_id: int, tokens: Sequence[int], **decoding: Any) -> AdmittedRequest:
    return AdmittedRequest(
        request_id=request_id, token_ids=list(tokens), num_prompt_tokens=len(tokens),
        block_ids=([request_id],), decoding=Decoding(max_tokens=9, **decoding),
    )  # fmt: skip


def row(
    request_id: int, start: int, count: int, drafts: Sequence[int] = (), *, samples: bool = True
) -> PlannedRow:
    return PlannedRow(
        request_id=request_id, start=start, num_tokens=count + len(drafts),
        samples=(1 + len(drafts)) if samples else 0, draft_token_ids=tuple(drafts),
    )  # fmt: skip


def found(runner: Runner, plan: StepPlan) -> dict[int, SampledRow]:
    return {row.request_id: row for row in runner.launch(plan).result().sampled}


def counting(seat: int, position: int) -> int:
    """After a prompt of 5 comes 5, 6, 7, ..."""
    return position


def test_a_plan_is_applied_in_order() -> None:
    runner, backend = runner_of(counting)
    runner.launch(StepPlan(step_id=1, admitted=[admitted(1, range(5))], rows=[row(1, 0, 5)]))
    backend.calls.clear()
    plan = StepPlan(
        step_id=2, released=[1], admitted=[admitted(2, range(5))], rows=[row(2, 0, 5)],
        copies=[(1, 2), (3, 4), (4, 5), (1, 6)],
    )  # fmt: skip
    result = runner.launch(plan).result()
    assert backend.calls == [
        "release", ("admit", 2), ("copy", [(1, 2), (3, 4)]), ("copy", [(4, 5), (1, 6)]), "launch"
    ]  # fmt: skip
    assert result.step_id == 2 and result.sampled[0].token_ids == [5]
    assert runner.launch(StepPlan(step_id=3, released=[2])).result().sampled == []


def test_copies_that_build_on_one_another_are_apart() -> None:
    assert list(independent([])) == []
    assert list(independent([(1, 2), (2, 3), (3, 1)])) == [[(1, 2)], [(2, 3)], [(3, 1)]]


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ((5, 6, 7), [5, 6, 7, 8]),
        ((5, 6, 9), [5, 6, 7]),
        ((5, 9, 7), [5, 6]),
        ((9, 6, 7), [5]),
        ((5,), [5, 6]),
        ((), [5]),
    ],
)
def test_drafts_are_accepted_as_far_as_they_are_what_was_sampled(
    drafts: tuple[int, ...], expected: list[int]
) -> None:
    runner, backend = runner_of(counting, logprobs=True)
    plan = StepPlan(
        step_id=1,
        admitted=[admitted(1, range(4)), admitted(2, range(9)), admitted(3, range(5))],
        rows=[row(1, 0, 2, samples=False), row(3, 0, 5, drafts), row(2, 0, 9)],
    )
    rows = found(runner, plan)
    assert rows.keys() == {2, 3}
    assert rows[3].token_ids == expected
    assert [entry.token_id for entry in rows[3].logprobs or ()] == expected
    assert rows[2].token_ids == [9] and len(rows[2].logprobs or ()) == 1
    (step,) = backend.steps
    assert step["ids"][1] == [*range(5), *drafts]
    assert step["samples"] == [1] * (1 + len(drafts)) + [2]
    assert step["positions"] == [*range(5, 6 + len(drafts)), 9]
    assert step["rows"] == [[0, 2, 0], [0, 5 + len(drafts), 1 + len(drafts)], [0, 9, 1]]
    # The next row finds the tokens that were accepted.
    reach = 5 + len(expected)
    runner.launch(StepPlan(step_id=2, rows=[row(3, reach - 1, 1)]))
    assert backend.steps[-1]["ids"] == [[expected[-1]]]
    assert runner.seats.num_brought[runner.seats.seat_of[3]] == (reach if drafts else 5)


def test_numbers_that_are_none_fail_a_row_when_no_token_comes_before_them() -> None:
    runner, _ = runner_of(lambda seat, position: NAN if position == 7 else position)
    admissions = [admitted(1, range(5)), admitted(2, range(5)), admitted(3, range(7))]
    plan = StepPlan(
        step_id=1,
        admitted=admissions,
        rows=[row(1, 0, 5, [5, 9, 7]), row(2, 0, 5, [5, 6, 7]), row(3, 0, 7)],
    )
    rows = found(runner, plan)
    assert rows[1].token_ids == [5, 6] and rows[1].error is None
    assert rows[2].token_ids == [5, 6] and rows[2].error is None, "as without drafts"
    assert rows[3].token_ids == [] and rows[3].error == NAN_ERROR
    rows = found(runner, StepPlan(step_id=2, rows=[row(2, 6, 1, [7])]))
    assert rows[2].token_ids == [] and rows[2].error == NAN_ERROR


def test_rules_allow_force_and_fail() -> None:
    runner, backend = runner_of(lambda seat, position: 6)
    stuck = TokenRules(bad_words=[[6]])
    admissions = [
        admitted(1, range(5), allowed_token_ids=[6], rules=stuck),
        admitted(2, range(5), allowed_token_ids=[6, 7]),
        admitted(3, range(5)),
    ]
    rows = found(
        runner,
        StepPlan(step_id=1, admitted=admissions, rows=[row(i, 0, 5) for i in (3, 1, 2)]),
    )
    assert rows[1].error == str(NoTokenLeftError(["allowed_token_ids", "bad_words"]))
    assert rows[1].token_ids == []
    assert rows[2].token_ids == rows[3].token_ids == [6]
    assert list(backend.steps[0]["masks"]) == [2]


def test_rules_beside_drafts() -> None:
    """A ruled row's sample is not at the index of its row."""
    runner, _ = runner_of(counting)
    admissions = [admitted(1, range(5)), admitted(2, range(9), allowed_token_ids=[9])]
    rows = found(
        runner,
        StepPlan(step_id=1, admitted=admissions, rows=[row(1, 0, 5, [5, 6]), row(2, 0, 9)]),
    )
    assert rows[1].token_ids == [5, 6, 7] and rows[2].token_ids == [9]
    runner.seats.rules[runner.seats.seat_of[2]] = Forcing()  # type: ignore[assignment]
    rows = found(runner, StepPlan(step_id=2, rows=[row(1, 7, 1, [8, 8]), row(2, 9, 1)]))
    assert rows[1].token_ids == [8, 9] and rows[2].token_ids == [10, 20, 30]


class Forcing:
    """A grammar's rules that force two tokens after each."""

    def masks_along(self, drafts: Sequence[int]) -> list[None]:
        return [None] * (1 + len(drafts))

    def learn(self, token: int) -> bool:
        self.last = token
        return True

    def forced(self, most: int) -> list[int]:
        return [self.last + 10, self.last + 20][:most]


def test_forced_tokens_follow_and_are_computed_next() -> None:
    runner, backend = runner_of(counting)
    runner.launch(
        StepPlan(step_id=1, admitted=[admitted(1, range(5))], rows=[row(1, 0, 4, samples=False)])
    )
    runner.seats.rules[runner.seats.seat_of[1]] = Forcing()  # type: ignore[assignment]
    rows = found(runner, StepPlan(step_id=2, rows=[row(1, 4, 1)]))
    assert rows[1].token_ids == [5, 15, 25]
    assert ("force", [15, 25]) in backend.calls
    runner.launch(StepPlan(step_id=3, rows=[row(1, 5, 3)]))
    assert backend.steps[-1]["ids"] == [[5, 15, 25]]


def test_a_late_result_does_not_touch_its_seats_next_request() -> None:
    runner, backend = runner_of(lambda seat, position: 33)
    runner.launch(
        StepPlan(step_id=1, admitted=[admitted(1, range(5))], rows=[row(1, 0, 5)])
    ).result()
    late = runner.launch(StepPlan(step_id=2, rows=[row(1, 5, 1)]))
    again = StepPlan(
        step_id=3,
        released=[1],
        admitted=[admitted(2, range(20))],
        rows=[row(2, 0, 10, samples=False)],
    )
    runner.launch(again)
    late.result()
    runner.launch(StepPlan(step_id=4, rows=[row(2, 5, 10, samples=False)]))
    assert backend.steps[-1]["ids"] == [list(range(5, 15))]


def test_hidden_states_are_widened_on_the_host() -> None:
    """In float64 on the device, those of a step of 8,192 tokens would be 268 MB that nobody planned."""
    states = torch.randn(4, 6, dtype=torch.bfloat16)
    on_device = SimpleNamespace(cpu=lambda: states)
    pooling = PoolingParams(pooling="mean", normalize=False)
    work = PromptWork(prompt=[1] * 4, pooling=pooling, first=4, num_logprobs=0, also=[])
    found = work._pool(cast(torch.Tensor, on_device), 4)
    assert found is not None
    assert found.embedding == pytest.approx(states.double().mean(0).tolist(), abs=1e-6)
