"""What /metrics says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(\{[^}]*\})? (\S+)")


@dataclass(frozen=True, slots=True)
class Metrics:
    values: Mapping[tuple[str, str], float]
    """By name and labels, as they are written."""

    def sum(self, name: str, label: str = "") -> float:
        """Over all series of that name whose labels contain `label`. Raises `KeyError` if there is none."""
        found = [
            value for (n, labels), value in self.values.items() if n == name and label in labels
        ]
        if not found:
            raise KeyError(f"{name}{label and ' with ' + label}")
        return sum(found)

    def nonzero(self, name: str) -> list[str]:
        """ "name{labels} value" of each series that is not 0."""
        return [
            f"{n}{labels} {value:g}"
            for (n, labels), value in self.values.items()
            if n == name and value != 0
        ]

    def has(self, name: str) -> bool:
        return any(n == name for n, _ in self.values)


def read_metrics(text: str) -> Metrics:
    """Prometheus' text format."""
    values = {}
    for line in text.splitlines():
        if (match := _LINE.fullmatch(line)) is not None:
            values[match[1], match[2] or ""] = float(match[3])
    return Metrics(values)
