"""What a request went through: facts as plain values, which are JSON as they are, and sentences of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from quire.messages import FinishReason
from quire.prefix_report import MissReason
from quire.scheduler.decisions import WaitReason

MOST_PARTS = 3
"""Of a sentence that lists what was longest."""
LEAST = 5e-5
"""Seconds that are worth a part of a sentence."""
LONG_GAP = 1.5
"""A gap is worth a sentence if it is so many times the median one."""

Taken = tuple[tuple[int, int], ...]
"""Requests, with the tokens of their prompts that some steps computed; most first."""


@dataclass(frozen=True, slots=True)
class WaitPart:
    """All time in which a request waited for the same. Numbers that do not apply are 0."""

    seconds: float
    reason: WaitReason | None
    """None: the record of it is lost."""
    behind: tuple[int, ...] = ()
    """Those before it at whom admission stopped, one after the other, or whose prompt it shares."""
    because: WaitReason | None = None
    """For what they waited."""
    holder: int | None = None
    """Whose row was the largest of these steps, if tokens were lacking."""
    holder_prompt: int = 0
    holder_tokens: tuple[int, int] = (0, 0)
    """The fewest and the most of a step."""
    budget: int = 0
    """Of each step."""
    step_tokens: int = 0
    """That these steps computed at least."""
    needed: int = 0
    """Blocks, or tokens if those were lacking; at the beginning of its longest time."""
    free: int = 0


@dataclass(frozen=True, slots=True)
class Prefill:
    """From its first admission to its first token."""

    seconds: float
    num_steps: int
    num_tokens: int
    """Computed for it; more than its prompt if it was preempted meanwhile."""
    step_tokens: int
    """Of all rows of these steps."""
    others: Taken


@dataclass(frozen=True, slots=True)
class Stop:
    """A preemption."""

    after: float
    """Seconds after its arrival."""
    by: int | None
    """For whom; itself, if it was the last of the order."""
    needed: int
    free: int
    num_computed: int
    """Tokens that had KV."""
    waited: float
    parts: tuple[WaitPart, ...]
    recomputed: int | None
    """Tokens that were not found again; None while it waits."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Between two steps that gave it tokens."""

    seconds: float
    token: int
    """The one that was late, counted from 1."""
    cause: str
    """preempted | held | prompts | idle | step"""
    others: Taken = ()
    held: WaitReason | None = None
    num_rows: int = 0


@dataclass(frozen=True, slots=True)
class Explanation:
    request_id: int
    is_whole: bool
    """False if the record does not reach back to its arrival."""
    arrived: float | None
    """Unix time."""
    num_prompt_tokens: int
    max_tokens: int
    is_queued: bool
    """Now: it has not run."""
    queue_seconds: float
    queue: tuple[WaitPart, ...]
    cached: int | None
    """Tokens of the prompt that were not computed; None if it has not run."""
    miss: MissReason | None
    """Why no more."""
    prefill: Prefill | None
    preemptions: tuple[Stop, ...]
    drafts: tuple[int, int]
    """Verified, and accepted."""
    first_token: float | None
    """Seconds after its arrival."""
    num_tokens: int
    median_gap: float | None
    gaps: tuple[Gap, ...]
    """The longest, the longest first."""
    finish_reason: FinishReason | None
    seconds: float | None
    """From arrival to end."""
    sentences: tuple[str, ...] = ()

    def entry(self, replica: int = 0) -> dict[str, object]:
        """As endpoints and commands have it."""
        facts = dataclasses.replace(self, sentences=())
        name = f"r{self.request_id}"
        return {"id": name, "replica": replica, "explanation": self.sentences, "facts": facts}

    def __str__(self) -> str:
        return "\n".join(self.sentences)


# --- sentences ------------------------------------------------------------------------------------


def sentences_of(facts: Explanation) -> list[str]:
    """In the order of a request's life."""
    written = [_arrived(facts)]
    if facts.is_whole:
        written.append(_queued(facts))
    if facts.cached is not None:
        written.append(_cache(facts))
    if facts.prefill is not None:
        written.append(_prefill(facts.prefill))
    written += [_preempted(facts, stop) for stop in facts.preemptions]
    if facts.drafts[0]:
        written.append(f"Of {_count(facts.drafts[0], 'draft')}, {facts.drafts[1]:,} were accepted.")
    if facts.first_token is not None:
        written.append(f"The first token came {duration(facts.first_token)} after its arrival.")
    if facts.median_gap is not None:
        written.append(_gaps(facts))
    written.append(_ended(facts))
    return written


def _arrived(facts: Explanation) -> str:
    name = f"r{facts.request_id}"
    if facts.arrived is None:
        return f"The record does not reach back to the arrival of {name}."
    when = datetime.fromtimestamp(facts.arrived, UTC)
    at = f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03} UTC"
    prompt = _count(facts.num_prompt_tokens, "token")
    return f"{name} arrived at {at} with a prompt of {prompt}, to generate at most {facts.max_tokens:,}."


def _queued(facts: Explanation) -> str:
    so_far = " so far" if facts.is_queued else ""
    if facts.finish_reason is not None and facts.cached is None:
        so_far = " and never ran"
    parts = list_of(facts.queue)
    return f"It was queued {duration(facts.queue_seconds)}{so_far}{parts}."


def list_of(parts: Sequence[WaitPart]) -> str:
    """The longest, in their order; the others are one."""
    parts = [part for part in parts if part.seconds >= LEAST]
    kept = sorted(parts, key=lambda part: -part.seconds)[:MOST_PARTS]
    texts = [f"{duration(part.seconds)} {reason_of(part)}" for part in parts if part in kept]
    rest = sum(part.seconds for part in parts if part not in kept)
    if rest:
        texts.append(f"{duration(rest)} for other reasons")
    return ": " + "; ".join(texts) if texts else ""


def reason_of(part: WaitPart) -> str:
    """What it waited for, to be put after a duration."""
    if part.reason is None:
        return "for a reason that the record has lost"
    if part.reason is not WaitReason.BEHIND:
        return _lacked(part.reason, part)
    name = names_of(part.behind)
    if part.because is WaitReason.BUDGET:
        return _lacked(WaitReason.BUDGET, part)
    if part.because is None:
        return f"behind {name}"
    return f"behind {name}, which waited {_lacked(part.because, part)}"


def _lacked(reason: WaitReason, part: WaitPart) -> str:
    behind = names_of(part.behind)
    if reason is WaitReason.BUDGET:
        return _budget(part)
    if reason is WaitReason.BLOCKS:
        return f"for {_count(part.needed, 'block')} ({max(0, part.free):,} free at first)"
    if reason is WaitReason.ARRIVED:
        if part.holder is None:
            return "until the next step was planned"
        return f"for the step under way{_beside(part)}"
    if reason is WaitReason.PREFIX:
        return f"for {behind} to compute the prefix that both have"
    if reason is WaitReason.FORK:
        return f"for {behind} to compute the prompt that both have"
    if reason is WaitReason.PREEMPTED:
        return "in the step that preempted it"
    return _FOR[reason]


_FOR = {
    WaitReason.SEAT: "for a sequence slot",
    WaitReason.BEHIND: "behind others",
    WaitReason.TOKEN: "for its last token, which a step in flight sampled",
    WaitReason.SHARE: "for its turn among the plans in flight",
    WaitReason.TARGET: "because the steps had no time for it beside those that generate (--itl-target)",
    WaitReason.COST: "because it would have been preempted too soon",
    WaitReason.LOAD: "while its KV was loaded from outside the cache",
    WaitReason.GRAMMAR: "while its grammar was compiled",
    WaitReason.ADAPTER: "while its adapter was loaded",
    WaitReason.PLACE: "for a place for its adapter",
}


def _budget(part: WaitPart) -> str:
    least, most = part.holder_tokens
    if part.needed > 1 and part.reason is not WaitReason.BEHIND:
        return f"for a step with room for its {part.needed:,} tokens, which are not divided"
    if part.holder is None or most <= 1 or part.step_tokens < part.budget:
        return "because those before it used what each step keeps for the queue"
    share = f"{most:,} of each step's" if least == most else f"up to {most:,} of a step's"
    prompt = f"whose prompt of {part.holder_prompt:,}" if part.holder_prompt else "whose prompt"
    return f"behind r{part.holder}, {prompt} took {share} {part.budget:,}"


def _beside(part: WaitPart) -> str:
    if part.holder_tokens[1] <= 1:
        return ""
    return f", which computed {part.holder_tokens[1]:,} tokens of r{part.holder}"


def _cache(facts: Explanation) -> str:
    held = f"{facts.cached:,}" if facts.cached else "none"
    why = "" if facts.miss is None else f": {_MISSES[facts.miss]}"
    return f"The cache held {held} of its {_count(facts.num_prompt_tokens, 'token')}{why}."


_MISSES = {
    MissReason.WHOLE: "all but the last, which is always computed",
    MissReason.BOUNDARY: "only whole blocks are shared",
    MissReason.OFF: "the prefix cache is off",
    MissReason.CAPPED: "its own parameters limit what it may share",
    MissReason.EVICTED: "the next one had been evicted",
    MissReason.RESET: "the next one had been dropped by a reset of the cache",
    MissReason.NOT_LOADED: "the next ones are in a store outside the cache, which had no room for them",
    MissReason.LOAD_LATE: "the next ones were being loaded, which took too long",
    MissReason.LOAD_FAILED: "the next ones could not be loaded",
    MissReason.ADAPTER: "the next one was computed with another adapter",
    MissReason.SALT: "the next one is there under another salt",
    MissReason.UNSEEN: "the next one had not been computed before",
}


def _prefill(prefill: Prefill) -> str:
    computed = f"{prefill.num_tokens:,} {'was' if prefill.num_tokens == 1 else 'were'} computed"
    text = f"{computed} in {_count(prefill.num_steps, 'step')}, in {duration(prefill.seconds)}"
    if prefill.others:
        text += f", beside {_taken(prefill.others)}"
    return f"{text}."


def _taken(others: Taken) -> str:
    shown = others if len(others) <= MOST_PARTS else others[: MOST_PARTS - 1]
    texts = [f"{count:,} of r{name}" for name, count in shown]
    if rest := others[len(shown) :]:
        texts.append(f"{sum(count for _, count in rest):,} of {len(rest)} others")
    return f"prompt tokens of others: {', '.join(texts)}"


def _preempted(facts: Explanation, stop: Stop) -> str:
    itself = stop.by is None or stop.by == facts.request_id
    who = "it" if itself else f"r{stop.by}"
    text = (
        f"It was preempted {duration(stop.after)} after its arrival, because {who} needed "
        f"{_count(stop.needed, 'block')} and {stop.free:,} were free; it waited {duration(stop.waited)}"
    )
    text += list_of(stop.parts)
    if stop.recomputed is None:
        return f"{text}."
    return (
        f"{text}. Then {stop.recomputed:,} of its {stop.num_computed:,} tokens were computed again."
    )


def _gaps(facts: Explanation) -> str:
    assert facts.median_gap is not None
    text = f"Its tokens came {duration(facts.median_gap)} apart in the median"
    if not facts.gaps:
        return f"{text}, and none took more than {LONG_GAP} times as long."
    each = [
        f"{duration(gap.seconds)} before token {gap.token:,}{cause_of(gap)}" for gap in facts.gaps
    ]
    return f"{text}; the longest: {'; '.join(each)}."


def cause_of(gap: Gap) -> str:
    """To be put after the gap."""
    if gap.cause == "preempted":
        return ", when it was preempted"
    if gap.cause == "held":
        why = "" if gap.held is None else f": {gap.held.value}"
        return f", when it had no row in a step{why}"
    if gap.cause == "prompts":
        return f", beside {_taken(gap.others)}"
    if gap.cause == "idle":
        return ", most of it between two steps"
    return f", in a step of {_count(gap.num_rows, 'row')} without prompts"


_ENDS = {
    FinishReason.STOP: "It stopped",
    FinishReason.LENGTH: "It ended at its limit of length",
    FinishReason.ABORT: "It was aborted",
    FinishReason.ERROR: "It ended with an error",
    FinishReason.REPETITION: "It ended because it repeated itself",
    FinishReason.TIMEOUT: "Its deadline passed while it ran, which ended it",
    FinishReason.EXPIRED: "Its deadline passed while it was queued, which ended it",
}


def _ended(facts: Explanation) -> str:
    tokens = _count(facts.num_tokens, "token")
    if facts.finish_reason is None:
        return f"It has not ended; it has {tokens} so far."
    after = "" if facts.seconds is None else f" {duration(facts.seconds)} after its arrival,"
    return f"{_ENDS[facts.finish_reason]}{after} with {tokens}."


def names_of(ids: Sequence[int]) -> str:
    if len(ids) > 2:
        return f"{len(ids)} others"
    return " and ".join(f"r{each}" for each in ids) or "another"


def duration(seconds: float) -> str:
    if seconds >= 10.0:
        return f"{seconds:,.1f} s"
    if seconds >= 1.0:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
