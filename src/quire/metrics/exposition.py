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
    """A registry with `process_*`, `python_info` and `python_gc_*`, shared with nobody."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry) -> tuple[bytes, str]:
    """(body, content type), always in the text format 0.0.4 that every scraper reads.

    No content negotiation: prometheus_client's OpenMetrics writer (0.26) rewrites the colon of a
    sample's name to an underscore unless the scraper asks otherwise, and `vllm:` names would vanish
    from the dashboards of everyone with Prometheus 2.
    """
    return generate_latest(registry), CONTENT_TYPE_LATEST
