"""A `History` as Chrome's trace events, which https://ui.perfetto.dev opens.

Slices of one track must nest, so a step that overlaps another one in flight is drawn on a track below.
Requests overlap anyhow: each is an asynchronous span of its own, with its phases inside. Arrows lead from the
step that made a request wait to the one that admitted it. (Format: "Trace Event Format", Google, 2016.)
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from quire.scheduler.explain import queue_of
from quire.scheduler.explanation import duration, reason_of
from quire.scheduler.history import History, StepRecord
from quire.scheduler.lives import Life, lives

Event = dict[str, object]
FIRST_TRACK = 1


def timeline(histories: Sequence[History], *, seconds: float | None = None) -> dict[str, object]:
    """A JSON object. histories: of each engine core. seconds: the last ones only."""
    histories = [recent(history, seconds) for history in histories]
    epoch = histories[0].epoch if histories else 0.0
    shifts = [history.epoch - epoch for history in histories]  # of clocks; small numbers are exact
    starts = [s + _start(h) for s, h in zip(shifts, histories, strict=True) if h.steps]
    zero = min(starts, default=0.0)
    events: list[Event] = []
    for index, (history, shift) in enumerate(zip(histories, shifts, strict=True)):
        drawn = _Drawing(history, index + 1, shift - zero)
        name = "quire" if len(histories) == 1 else f"replica {index}"
        events += drawn.events(name)
    events.sort(key=lambda event: (event["ph"] != "M", event["ts"]))
    start = datetime.fromtimestamp(epoch + zero, UTC).isoformat()
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"start": start}}


def recent(history: History, seconds: float | None) -> History:
    """Only the steps of the last seconds, and the requests that had not ended before them."""
    if seconds is None or not history.steps:
        return history
    since = history.steps[-1].planned - seconds
    at = bisect_left(history.steps, since, key=lambda step: step.planned)
    ends = {name: end for name, end in history.ends.items() if end.time >= since}
    arrivals = {
        name: each
        for name, each in history.arrivals.items()
        if name in ends or name not in history.ends
    }
    return dataclasses.replace(history, steps=history.steps[at:], arrivals=arrivals, ends=ends)


def _start(history: History) -> float:
    return min([history.steps[0].planned, *(each.start for each in history.arrivals.values())])


def phases(life: Life, until: float) -> list[tuple[float, float, str]]:
    """Start, end and name, one after the other. until: the end of one that has not ended."""
    over = until if life.end is None else life.end.time
    cuts: list[tuple[float, str]] = []
    if life.is_whole and life.arrival is not None:
        cuts.append((life.arrival.start, "queued"))
    elif life.rows and not (life.admissions and life.admissions[0][0] is life.rows[0][0]):
        cuts.append((life.rows[0][0].planned, "running"))
    stops = [*(each.step_id for each in life.preemptions), float("inf")]
    tokens = life.tokens
    for step, _ in life.admissions:
        had = any(token.step_id < step.step_id for token, _ in tokens)
        cuts.append((step.planned, "recompute" if had else "prefill"))
        stop = next(each for each in stops if each > step.step_id)
        first = next((t for t, _ in tokens if step.step_id <= t.step_id < stop), None)
        if first is not None and first.done is not None:
            cuts.append((first.done, "decode"))
    cuts += [(each.time, "preempted") for each in life.preemptions]
    cuts = sorted((cut for cut in cuts if cut[0] <= over), key=lambda cut: cut[0])
    ends = [time for time, _ in cuts[1:]] + [over]
    return [(s, e, name) for (s, name), e in zip(cuts, ends, strict=True) if e > s]


class _Drawing:
    def __init__(self, history: History, pid: int, shift: float) -> None:
        self._history, self._pid, self._shift = history, pid, shift
        self._tracks: dict[int, int] = {}
        """The track of each step."""
        self._until = max(
            (step.done if step.done is not None else step.planned for step in history.steps),
            default=0.0,
        )

    def events(self, name: str) -> list[Event]:
        found = lives(self._history)
        drawn = [*self._steps(), *self._counters()]
        for life in found.values():
            drawn += self._request(life)
            drawn += self._causes(life)
        tracks = sorted(set(self._tracks.values()))
        return [
            self._name("process_name", 0, name),
            *(
                self._name("thread_name", tid, "steps" if tid == FIRST_TRACK else "steps in flight")
                for tid in tracks
            ),
            *drawn,
        ]

    def _event(self, ph: str, time: float, name: str, tid: int = 0, /, **more: object) -> Event:
        ts = round((time + self._shift) * 1e6, 3)
        return {"ph": ph, "pid": self._pid, "tid": tid, "ts": ts, "name": name, **more}

    def _name(self, what: str, tid: int, name: str) -> Event:
        return {
            "ph": "M",
            "pid": self._pid,
            "tid": tid,
            "ts": 0,
            "name": what,
            "args": {"name": name},
        }

    def _steps(self) -> Iterator[Event]:
        ends: list[float] = []
        for step in self._history.steps:
            if step.done is None and not step.rows:
                continue  # no request could run, so it was not launched
            end = self._until if step.done is None else step.done
            track = next((i for i, until in enumerate(ends) if until <= step.planned), len(ends))
            ends[track : track + 1] = [end]
            tid = self._tracks[step.step_id] = FIRST_TRACK + track
            start = self._event("X", step.planned, _title(step), tid, cat="step", args=_args(step))
            stop = self._event("X", end, "")
            yield start | {"dur": round(stop["ts"] - start["ts"], 3)}  # type: ignore[operator]
            for decision in step.decisions:
                if decision.kind.value == "preempted":
                    title = f"r{decision.request_id} preempted for r{decision.because_of}"
                    args = {"needed": decision.needed, "free": decision.free}
                    yield self._event("i", step.planned, title, tid, s="t", cat="step", args=args)

    def _counters(self) -> Iterator[Event]:
        for step in self._history.steps:
            queue = {"waiting": step.num_waiting, "running": step.num_running}
            yield self._event("C", step.planned, "requests", args=queue)
            used = {"used": step.num_blocks - step.num_free}
            yield self._event("C", step.planned, "KV blocks", args=used)

    def _request(self, life: Life) -> Iterator[Event]:
        """Spans of one id nest by their order."""
        inner = phases(life, self._until)
        if not inner:
            return
        name = f"r{life.request_id}"
        common: Event = {"cat": "request", "id": name}
        args: dict[str, object] = {}
        if life.arrival is not None:
            args = {"prompt": life.arrival.num_prompt_tokens, "max_tokens": life.arrival.max_tokens}
        if life.end is not None:
            args |= {"finish": life.end.reason.value, "tokens": life.end.num_output_tokens}
        yield self._event("b", inner[0][0], name, args=args) | common
        for start, end, phase in inner:
            waited: Mapping[str, object] = {}
            if phase in ("queued", "preempted"):
                parts = queue_of(self._history, life, start, end)
                waited = {reason_of(part): duration(part.seconds) for part in parts}
            yield self._event("b", start, phase, args=waited) | common
            yield self._event("e", end, phase) | common
        yield self._event("e", inner[-1][1], name) | common

    def _causes(self, life: Life) -> Iterator[Event]:
        """For each time in the queue, from the step with which its longest part began."""
        starts = [life.arrival.start if life.arrival is not None else 0.0]
        starts += [each.time for each in life.preemptions]
        for index, (back, _) in enumerate(life.admissions):
            since = max((start for start in starts if start < back.planned), default=back.planned)
            waits = [wait for wait in life.waits if since <= wait.start < back.planned]
            longest = max(waits, key=lambda wait: wait.seconds, default=None)
            at = -1
            if longest is not None:
                steps = self._history.steps
                at = bisect_left(steps, longest.start + 1e-9, key=lambda step: step.planned) - 1
            if longest is None or at < 0:
                continue
            cause = self._history.steps[at]
            # The engine may have failed while it planned the step that admitted it.
            if cause is back or not {cause.step_id, back.step_id} <= self._tracks.keys():
                continue
            lacked = longest.lacked
            common: Event = {"cat": "cause", "id": f"{self._pid}.{life.request_id}.{index}"}
            name = f"r{life.request_id}: {lacked.value if lacked is not None else 'waits'}"
            yield self._event("s", cause.planned, name, self._tracks[cause.step_id]) | common
            tid = self._tracks[back.step_id]
            yield self._event("f", back.planned, name, tid, bp="e") | common


def _title(step: StepRecord) -> str:
    prompts = sum(row.num_tokens for row in step.rows if row.num_tokens - row.num_drafts > 1)
    others = len(step.rows) - sum(row.num_tokens - row.num_drafts > 1 for row in step.rows)
    parts = [f"{prompts} of prompts"] if prompts else []
    return " + ".join([*parts, *([f"{others} decode"] if others or not parts else [])])


def _args(step: StepRecord) -> Event:
    largest = sorted(step.rows, key=lambda row: -row.num_tokens)[:8]
    return {
        "step": step.step_id,
        "budget": step.budget,
        "tokens": sum(row.num_tokens for row in step.rows),
        "rows": len(step.rows),
        "largest": {f"r{row.request_id}": row.num_tokens for row in largest},
    }
