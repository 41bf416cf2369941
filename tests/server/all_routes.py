"""Every route of an app, with those of included routers, which FastAPI keeps nested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.routing import Route


def all_routes(router: Any) -> Iterator[Route]:
    """router: an app, or a router without a prefix, as all of ours are."""
    for route in router.routes:
        nested = getattr(route, "original_router", None)
        if nested is not None:
            yield from all_routes(nested)
        elif isinstance(route, Route):
            yield route
