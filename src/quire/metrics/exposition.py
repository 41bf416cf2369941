"""One registry per app, and its text form."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)


def new_registry() -> CollectorRegistry:
    """A new registry with `process_*`, `python_info` and `python_gc_*`."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry) -> tuple[bytes, str]:
    """(body, content type), always in the text format 0.0.4 that every scraper reads.

    No content negotiation: prometheus_client's OpenMetrics writer (0.26) replaces the colon in a sample's
    name by an underscore unless the scraper asks otherwise, and dashboards on Prometheus 2 would lose the
    `vllm:` names.
    """
    return generate_latest(registry), CONTENT_TYPE_LATEST
