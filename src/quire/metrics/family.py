"""Making the metrics of one registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

M = TypeVar("M", Gauge, Counter, Histogram)


class Family:
    """Makes metrics of one registry, with the labels `model_name, engine` set."""

    def __init__(
        self, registry: CollectorRegistry, model_name: str, engine: str, made: dict[str, Any]
    ) -> None:
        """made: the families that are there, by name."""
        self._registry = registry
        self.base = {"model_name": model_name, "engine": engine}
        self._made = made

    def family(
        self, kind: type[M], name: str, text: str, labels: Sequence[str], **options: Any
    ) -> M:
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = kind(name, text, labels, registry=self._registry, **options)
        assert isinstance(found, kind)
        return found

    def gauge(self, name: str, text: str, **labels: str) -> Gauge:
        family = self.family(Gauge, name, text, [*self.base, *labels])
        return family.labels(**self.base, **labels)

    def counter(self, name: str, text: str, **labels: str) -> Counter:
        family = self.family(Counter, name, text, [*self.base, *labels])
        return family.labels(**self.base, **labels)

    def histogram(self, name: str, text: str, edges: tuple[float, ...]) -> Histogram:
        family = self.family(Histogram, name, text, [*self.base], buckets=edges)
        return family.labels(**self.base)

    def info(self, name: str, text: str, labels: Mapping[str, object]) -> None:
        shown = {key: str(value) for key, value in labels.items() if key not in self.base}
        self.family(Gauge, name, text, [*self.base, *shown]).labels(**self.base, **shown).set(1)
