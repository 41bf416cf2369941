"""Reports kernels that are compiled while requests are served: each stops all of them for up to a second."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

from triton import knobs

logger = logging.getLogger(__name__)

SERVING: ContextVar[bool] = ContextVar("serving", default=False)
"""Whether this thread launches a step that requests wait for."""
_reported: set[str] = set()


def report_compiles() -> None:
    """From now on, unless somebody else uses Triton's hook."""
    if knobs.runtime.jit_post_compile_hook is None:
        knobs.runtime.jit_post_compile_hook = _report


def _report(*, fn: Any, **details: Any) -> None:
    if SERVING.get() and fn.name not in _reported:
        _reported.add(fn.name)
        logger.warning(
            "the kernel %s was compiled while requests waited; please report this, with the options of the "
            "server and of the request",
            fn.name,
        )
