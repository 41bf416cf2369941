"""What must hold after a fault, when nothing runs: pure functions of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from quire.bench.chaos.metrics import Metrics
from quire.bench.chaos.wire import Answer, Kind, Outcome

IDLE_GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "quire:tenant_requests",
    "quire:tenant_requests_running",
    "quire:tenant_requests_waiting",
)
BLOCK_GAUGES = (
    "vllm:kv_cache_usage_perc",
    "quire:kv_slots_allocated",
    "quire:kv_slots_used",
    "quire:kv_blocks_shared",
)
SHOWN = 5
"""Violations of one kind that are written out."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen during a fault, and after it."""

    outcomes: Sequence[Outcome]
    """Of all requests since the last check, none of which was left by its client."""
    answers: Mapping[str, Answer]
    """Of the requests without any fault. Those that were never sent before are not here."""
    tolerates: Collection[Kind] = ()
    metrics: Metrics | None = None
    """None: /metrics was not answered."""
    statuses: Mapping[str, int] = field(default_factory=dict)
    """Path -> status, of the probes."""
    exit_status: int | None = None
    """None: the server runs."""
    zombies: Sequence[int] = ()
    roles: Mapping[str, int] = field(default_factory=dict)
    """What a process is -> how many there are."""
    expected_roles: Mapping[str, int] = field(default_factory=dict)


def ended_once(evidence: Evidence) -> list[str]:
    """Each request got one end: an answer, or what the fault may cause."""
    allowed = {Kind.ANSWER, *evidence.tolerates}
    return _some(
        f"{each.call}: {each.kind.value} {each.status or ''} after {each.seconds:.1f} s: {each.detail}"
        for each in evidence.outcomes
        if each.kind not in allowed
    )


def answers_equal(evidence: Evidence) -> list[str]:
    """What was answered is what an undisturbed server answers."""
    return _some(
        f"{each.call} has another answer: {_difference(evidence.answers[each.call], each.answer)}"
        for each in evidence.outcomes
        if each.kind is Kind.ANSWER
        and each.call in evidence.answers
        and each.answer != evidence.answers[each.call]
    )


def blocks_free(evidence: Evidence) -> list[str]:
    """No request holds KV."""
    return _zero(evidence, BLOCK_GAUGES)


def gauges_zero(evidence: Evidence) -> list[str]:
    """Nobody runs or waits."""
    return _zero(evidence, IDLE_GAUGES)


def server_well(evidence: Evidence) -> list[str]:
    """It runs, its probes say so, and each of its processes is there once."""
    if evidence.exit_status is not None:
        return [f"the server exited with {evidence.exit_status}"]
    found = [
        f"{path} answers {status}" for path, status in evidence.statuses.items() if status != 200
    ]
    for role, expected in evidence.expected_roles.items():
        if (count := evidence.roles.get(role, 0)) != expected:
            found.append(f"{count} processes instead of {expected}: {role}")
    if evidence.zombies:
        found.append(f"{len(evidence.zombies)} processes ended and were not waited for")
    return found


INVARIANTS: Mapping[str, Callable[[Evidence], list[str]]] = {
    "ended once": ended_once,
    "answers equal": answers_equal,
    "blocks free": blocks_free,
    "gauges zero": gauges_zero,
    "server well": server_well,
}


def violations(evidence: Evidence) -> list[str]:
    """Of all invariants, each with the invariant's name."""
    return [f"{name}: {text}" for name, holds in INVARIANTS.items() for text in holds(evidence)]


def is_settled(evidence: Evidence) -> bool:
    """Whether what takes a moment to hold, holds."""
    return not (blocks_free(evidence) or gauges_zero(evidence) or server_well(evidence))


def _zero(evidence: Evidence, names: Sequence[str]) -> list[str]:
    if evidence.metrics is None:
        return [] if evidence.exit_status is not None else ["/metrics is not answered"]
    missing = [f"/metrics has no {name}" for name in names if not evidence.metrics.has(name)]
    return missing + [text for name in names for text in evidence.metrics.nonzero(name)]


def _some(found: Iterable[str]) -> list[str]:
    texts = list(found)
    more = len(texts) - SHOWN
    return texts[:SHOWN] + ([f"and {more} more"] if more > 0 else [])


def _difference(expected: Answer, got: Answer | None) -> str:
    if got is None or len(got) != len(expected):
        return f"{0 if got is None else len(got)} choices instead of {len(expected)}"
    for index, (one, other) in enumerate(zip(expected, got, strict=True)):
        if one == other:
            continue
        pairs = zip(one.token_ids, other.token_ids, strict=False)
        place = next((n for n, (a, b) in enumerate(pairs) if a != b), -1)
        return (
            f"choice {index}: {len(other.token_ids)} tokens, {other.finish_reason}, instead of "
            f"{len(one.token_ids)}, {one.finish_reason}; first other token at {place}; "
            f"...{other.text[-60:]!r} instead of ...{one.text[-60:]!r}"
        )
    return "none"
