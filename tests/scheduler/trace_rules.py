"""The rules of Chrome's trace events that Perfetto's importer relies on."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

NEEDED = {
    "X": ("ts", "dur", "name", "pid", "tid"),
    "b": ("ts", "name", "cat", "id", "pid"),
    "e": ("ts", "name", "cat", "id", "pid"),
    "C": ("ts", "name", "pid", "args"),
    "i": ("ts", "name", "s", "pid", "tid"),
    "s": ("ts", "name", "cat", "id", "pid", "tid"),
    "f": ("ts", "name", "cat", "id", "pid", "tid", "bp"),
    "M": ("name", "pid", "args"),
}


def check_trace(trace: dict[str, Any]) -> None:
    """Raises AssertionError."""
    events = trace["traceEvents"]
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    for event in events:
        lacking = [name for name in NEEDED[event["ph"]] if name not in event]
        assert not lacking, (event, lacking)
        assert event["ts"] >= 0
    _check_slices(events)
    _check_spans(events)
    _check_flows(events)
    for event in events:
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(v, int) for v in event["args"].values())
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] in "Xisf"} <= named
    named = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert {event["pid"] for event in events} == named


def _check_slices(events: list[dict[str, Any]]) -> None:
    """On each track, two slices are apart, or one is in the other."""
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], -event["dur"]))
    for slices in tracks.values():
        open_ends: list[float] = []
        for start, minus in sorted(slices):
            while open_ends and open_ends[-1] <= start + 1e-3:
                open_ends.pop()
            assert not open_ends or start - minus <= open_ends[-1] + 1e-3
            open_ends.append(start - minus)


def _check_spans(events: list[dict[str, Any]]) -> None:
    """Of one id, spans nest like brackets."""
    stacks: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for event in events:
        key = (event["pid"], event.get("cat"), event.get("id"))
        if event["ph"] == "b":
            stacks[key].append(event["name"])
        elif event["ph"] == "e":
            assert stacks[key].pop() == event["name"], event
    assert not any(stacks.values())


def _check_flows(events: list[dict[str, Any]]) -> None:
    """Each arrow has a beginning in a slice, and then an end in one."""
    slices = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    begun = {}
    for event in events:
        if event["ph"] in "sf":
            at = event["ts"]
            assert any(s <= at <= e for s, e in slices[event["pid"], event["tid"]]), event
        if event["ph"] == "s":
            assert event["id"] not in begun
            begun[event["id"]] = event
        elif event["ph"] == "f":
            start = begun[event["id"]]
            assert (start["name"], start["cat"]) == (event["name"], event["cat"])
            assert start["ts"] <= event["ts"] and "done" not in start
            begun[event["id"]] = {**start, "done": True}
    assert all("done" in event for event in begun.values())
