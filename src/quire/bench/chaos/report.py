"""What a run did and found: JSON, and a summary for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from quire.bench.chaos.growth import LEAST_SAMPLES, Growth
from quire.bench.chaos.options import ChaosOptions
from quire.bench.record import run_record

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault, and what was found after it."""

    fault: str
    at: float
    """Seconds since the server was ready."""
    seconds: float
    """Until all requests had ended and the invariants were checked."""
    ended: Mapping[str, int]
    """How many requests ended how, without those that their clients left."""
    details: Mapping[str, object]
    violations: Sequence[str]


@dataclass(frozen=True, slots=True)
class ProcessReport:
    role: str
    life: int
    """Which of its role it was: 1, 2, ... after replacements."""
    growths: Sequence[Growth]


@dataclass(slots=True)
class Report:
    options: ChaosOptions
    command: Sequence[str]
    """Of the server."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Fault -> why it could not be done."""
    strikes: list[Strike] = field(default_factory=list)
    processes: list[ProcessReport] = field(default_factory=list)
    seconds: float = 0.0
    record: Mapping[str, object] = field(default_factory=run_record)
    """Made at the start: a checkout may change during an hour."""

    @property
    def violations(self) -> list[str]:
        """All, each with the fault before it."""
        found = [f"{each.fault}: {text}" for each in self.strikes for text in each.violations]
        for process in self.processes:
            found += [
                f"growth: {process.role} {process.life}: {each.figure} {shown(each)}"
                for each in process.growths
                if each.is_too_much
            ]
        return found

    @property
    def requests(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for each in self.strikes:
            total.update(each.ended)
        return total

    def as_json(self) -> dict[str, object]:
        return {
            "options": asdict(self.options),
            "server": list(self.command),
            "seconds": round(self.seconds, 1),
            "violations": self.violations,
            "requests": dict(self.requests),
            "faults": {name: self._of(name) for name in self._names()},
            "skipped": self.skipped,
            "processes": [asdict(each) for each in self.processes],
            "strikes": [asdict(each) for each in self.strikes],
            "record": dict(self.record),
        }

    def _names(self) -> list[str]:
        return list(dict.fromkeys(each.fault for each in self.strikes))

    def _of(self, name: str) -> dict[str, object]:
        strikes = [each for each in self.strikes if each.fault == name]
        ended: Counter[str] = Counter()
        for each in strikes:
            ended.update(each.ended)
        return {
            "struck": len(strikes),
            "ended": dict(ended),
            "violations": sum(len(each.violations) for each in strikes),
        }

    def as_text(self) -> str:
        lines = [f"{'fault':<20}{'struck':>7}{'answers':>9}{'other ends':>12}{'violations':>12}"]
        for name in self._names():
            figures = self._of(name)
            ended = figures["ended"]
            assert isinstance(ended, dict)
            answers = ended.get("answer", 0)
            other = sum(ended.values()) - answers
            lines.append(
                f"{name:<20}{figures['struck']:>7}{answers:>9}{other:>12}{figures['violations']:>12}"
            )
        lines += [f"{name:<20}skipped: {why}" for name, why in self.skipped.items()]
        for process in self.processes:
            lines += [
                f"{process.role} {process.life}: {each.figure} {shown(each)}"
                for each in process.growths
                if each.samples >= LEAST_SAMPLES or each.is_too_much
            ]
        found = self.violations
        ends = ", ".join(f"{count} {kind}" for kind, count in self.requests.most_common())
        lines.append(f"{len(self.strikes)} faults in {self.seconds:.0f} s; requests: {ends}")
        lines += [f"VIOLATION {text}" for text in found]
        lines.append(f"{len(found)} violations" if found else "no violation")
        return "\n".join(lines)


def shown(growth: Growth) -> str:
    """In MiB, if it is memory."""
    unit, name = (MIB, " MiB") if growth.figure == "memory" else (1, "")
    first, last = growth.first / unit, growth.last / unit
    return (
        f"{first:.1f} -> {last:.1f}{name}, by slope {growth.by_slope / unit:+.1f} "
        f"(bound {growth.bound / unit:.1f}; {growth.samples} samples)"
    )
