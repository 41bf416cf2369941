"""Why a request took the time that it took: facts from a `History`, and sentences of them.

The parts of the time in the queue add up to it: at each moment the request waited for one thing, which is the
first test that it failed in the step before.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median

from quire.prefix_report import MissReason
from quire.scheduler.decisions import WaitReason
from quire.scheduler.explanation import (
    LONG_GAP,
    MOST_PARTS,
    Explanation,
    Gap,
    Prefill,
    Stop,
    Taken,
    WaitPart,
    sentences_of,
)
from quire.scheduler.history import History, RowRecord, StepRecord
from quire.scheduler.lives import Life, Preemption, Waiting, lives


def explain(history: History, request_id: int) -> Explanation | None:
    """None if the record has nothing of it."""
    return next(iter(explain_each(history, (request_id,))), None)


def explain_each(history: History, request_ids: Sequence[int]) -> list[Explanation]:
    """Of those in the record, in one pass over it."""
    found = lives(history, request_ids)
    return [_explained(history, found[each]) for each in request_ids if each in found]


def slowest(history: History, most: int = 5) -> list[Explanation]:
    """Those that took longest until their first token, the slowest first."""
    found: list[tuple[float, Life]] = []
    for life in lives(history).values():
        if life.arrival is not None and life.is_whole:
            until = life.tokens[0][0].done if life.tokens else _over(life, history)
            found.append(((until or 0.0) - life.arrival.start, life))
    found.sort(key=lambda each: -each[0])
    return [_explained(history, life) for _, life in found[:most]]


def queue_reasons(history: History) -> list[tuple[str, float, int]]:
    """What all requests waited for: the reason, seconds of all together, and how many requests."""
    seconds: dict[str, float] = {}
    requests: Counter[str] = Counter()
    for life in lives(history).values():
        names = set()
        for wait in life.waits:
            lacked = wait.lacked
            name = lacked.value if lacked is not None else "not in the record"
            seconds[name] = seconds.get(name, 0.0) + wait.seconds
            names.add(name)
        requests.update(names)
    ordered = sorted(seconds.items(), key=lambda each: -each[1])
    return [(name, each, requests[name]) for name, each in ordered]


def queue_of(history: History, life: Life, start: float, end: float) -> tuple[WaitPart, ...]:
    """What it waited for between two times."""
    return _parts(history, [wait for wait in life.waits if start <= wait.start < end])


def summary(histories: Sequence[History], most: int) -> dict[str, object]:
    """The slowest requests of all engine cores, and what all waited for."""
    slow = [(i, each) for i, history in enumerate(histories) for each in slowest(history, most)]
    slow.sort(key=lambda each: -(each[1].first_token or each[1].queue_seconds))
    reasons = [
        {"replica": i, "reason": name, "seconds": seconds, "requests": count}
        for i, history in enumerate(histories)
        for name, seconds, count in queue_reasons(history)
    ]
    return {"requests": [each.entry(i) for i, each in slow[:most]], "reasons": reasons}


def parse_id(text: str) -> int | None:
    """Of `r17` or `17`."""
    digits = text.removeprefix("r")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def _over(life: Life, history: History) -> float:
    if life.end is not None:
        return life.end.time
    last = history.steps[-1]
    return last.planned if last.done is None else last.done


# --- facts ----------------------------------------------------------------------------------------


def _explained(history: History, life: Life) -> Explanation:
    arrival, end, tokens = life.arrival, life.end, life.tokens
    is_whole = life.is_whole
    start = arrival.start if arrival is not None and is_whole else None
    admitted = life.admissions[0] if is_whole and life.admissions else None
    until = admitted[0].planned if admitted is not None else float("inf")
    queued = [wait for wait in life.waits if wait.start < until] if is_whole else []
    gaps = _gaps(history, life) if len(tokens) > 1 else []
    middle = median(gap.seconds for gap in gaps) if gaps else None
    slow = [
        gap
        for gap in sorted(gaps, key=lambda gap: -gap.seconds)
        if gap.cause == "preempted" or gap.seconds > LONG_GAP * (middle or 0.0)
    ]
    first = tokens[0][0].done if tokens else None
    given = sum(row.num_accepted for _, row in tokens)
    facts = Explanation(
        request_id=life.request_id,
        is_whole=is_whole,
        arrived=None if start is None else history.epoch + start,
        num_prompt_tokens=arrival.num_prompt_tokens if arrival is not None else 0,
        max_tokens=arrival.max_tokens if arrival is not None else 0,
        is_queued=not life.rows and end is None,
        queue_seconds=sum(wait.seconds for wait in queued),
        queue=_parts(history, queued),
        cached=_start_in(life, admitted[0]) if admitted is not None else None,
        miss=_miss(admitted[1].reason) if admitted is not None else None,
        prefill=_prefill(life) if admitted is not None else None,
        preemptions=tuple(_stop(history, life, i, p) for i, p in enumerate(life.preemptions)),
        drafts=_drafts(life),
        first_token=first - start if start is not None and first is not None else None,
        num_tokens=end.num_output_tokens if end is not None else given,
        median_gap=middle,
        gaps=tuple(slow[:MOST_PARTS]),
        finish_reason=None if end is None else end.reason,
        seconds=end.time - start if start is not None and end is not None else None,
    )
    return dataclasses.replace(facts, sentences=tuple(sentences_of(facts)))


def _start_in(life: Life, admitted: StepRecord) -> int:
    """How many tokens it did not have to compute."""
    return next((row.start for step, row in life.rows if step is admitted), 0)


def _miss(reason: object) -> MissReason | None:
    return reason if isinstance(reason, MissReason) else None


def _drafts(life: Life) -> tuple[int, int]:
    verified = [row for step, row in life.rows if row.num_drafts and step.done is not None]
    accepted = sum(max(0, row.num_accepted - 1) for row in verified)
    return sum(row.num_drafts for row in verified), accepted


def _parts(history: History, waits: Iterable[Waiting]) -> tuple[WaitPart, ...]:
    """In the order in which each of them began."""
    groups: dict[object, list[Waiting]] = {}
    for wait in waits:
        key: object = (wait.reason, wait.because, wait.holder, wait.behind)
        if wait.lacked is WaitReason.BUDGET and wait.needed <= 1:
            key = wait.holder  # at the head of the queue or behind it
        elif wait.reason is WaitReason.BEHIND:
            key = wait.because
        groups.setdefault(key, []).append(wait)
    return tuple(_part(history, group) for group in groups.values())


def _part(history: History, waits: list[Waiting]) -> WaitPart:
    longest = max(waits, key=lambda wait: wait.seconds)
    behind = dict.fromkeys(wait.behind for wait in waits if wait.behind is not None)
    holder, prompt, least, most = longest.holder, 0, 0, 0
    budget = total = 0
    if holder is not None:
        if holder in history.arrivals:
            prompt = history.arrivals[holder].num_prompt_tokens
        steps = [step for wait in waits for step in _steps(history, wait)]
        each = [row.num_tokens for step in steps for row in step.rows if row.request_id == holder]
        least, most = min(each, default=0), max(each, default=0)
        budget = max((step.budget for step in steps), default=0)
        total = min((sum(row.num_tokens for row in step.rows) for step in steps), default=0)
    return WaitPart(
        sum(wait.seconds for wait in waits),
        longest.reason,
        tuple(behind),
        longest.because,
        holder,
        prompt,
        (least, most),
        budget,
        total,
        longest.needed,
        longest.free,
    )


def _steps(history: History, wait: Waiting) -> Sequence[StepRecord]:
    """Those that were planned while it waited; of an arrival, the one that was under way."""
    if wait.reason is WaitReason.ARRIVED:
        step = history.under_way(wait.start)
        return () if step is None else (step,)
    at = bisect_left(history.steps, wait.start, key=lambda step: step.planned)
    end = bisect_left(history.steps, wait.end, key=lambda step: step.planned)
    return history.steps[at:end]


def _prefill(life: Life) -> Prefill | None:
    """None until there is a first token."""
    rows: list[tuple[StepRecord, RowRecord]] = []
    for step, row in life.rows:
        rows.append((step, row))
        if row.num_accepted:
            break
    last = rows[-1][0].done if rows else None
    if last is None or not rows[-1][1].num_accepted:
        return None
    steps = [step for step, _ in rows]
    return Prefill(
        last - steps[0].planned,
        len(rows),
        sum(row.num_tokens for _, row in rows),
        sum(row.num_tokens for step in steps for row in step.rows),
        _others(life.request_id, steps),
    )


def _others(request_id: int, steps: Iterable[StepRecord]) -> Taken:
    """The tokens of others' prompts in these steps."""
    counts: Counter[int] = Counter()
    for step in steps:
        for row in step.rows:
            if row.request_id != request_id and row.num_tokens - row.num_drafts > 1:
                counts[row.request_id] += row.num_tokens
    return tuple(counts.most_common())


def _stop(history: History, life: Life, index: int, found: Preemption) -> Stop:
    back = next((a for a in life.admissions if a[0].step_id > found.step_id), None)
    until = back[0].planned if back is not None else float("inf")
    waits = [wait for wait in life.waits if found.time <= wait.start < until]
    return Stop(
        found.time - life.arrival.start if life.arrival is not None else 0.0,
        found.by,
        found.needed,
        found.free,
        found.num_computed,
        sum(wait.seconds for wait in waits),
        _parts(history, waits),
        None if back is None else max(0, found.num_computed - _start_in(life, back[0])),
    )


def _gaps(history: History, life: Life) -> list[Gap]:
    """Between each two steps that gave it tokens."""
    ids = [step.step_id for step in history.steps]
    found, tokens = [], life.tokens
    count = tokens[0][1].num_accepted
    if life.end is not None:  # earlier ones may be lost
        count += life.end.num_output_tokens - sum(row.num_accepted for _, row in tokens)
    with_row = {step.step_id for step, _ in life.rows}
    for (before, _), (after, row) in pairwise(tokens):
        assert before.done is not None and after.done is not None
        at, end = bisect_right(ids, before.step_id), bisect_right(ids, after.step_id)
        steps = history.steps[at:end]
        seconds, others = after.done - before.done, _others(life.request_id, steps)
        idle = seconds - sum(
            max(0.0, (step.done or after.done) - max(step.planned, before.done))
            for step in steps
            if step.rows
        )
        missed = [step for step in steps if step.step_id not in with_row]
        cause, held = "step", None
        if any(before.step_id < p.step_id <= after.step_id for p in life.preemptions):
            cause = "preempted"
        elif missed:
            decision = life.why_held(missed[0].step_id)
            cause = "held"
            if decision is not None and isinstance(decision.reason, WaitReason):
                held = decision.reason
        elif others:
            cause = "prompts"
        elif idle > seconds / 2:
            cause = "idle"
        found.append(Gap(seconds, count + 1, cause, others, held, len(after.rows)))
        count += row.num_accepted
    return found
