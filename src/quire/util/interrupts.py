"""Delays Ctrl-C during work that must not be interrupted."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the enums of `signal` take 10 us a step, warm
import threading
from collections.abc import Callable
from signal import SIGINT
from types import FrameType


class interrupts_deferred:
    """Delay SIGINT while the block runs; then the previous handler gets it, which usually raises
    `KeyboardInterrupt`. Outside the main thread, where no signal handler runs, this does nothing.

    A block that raises keeps its own exception as the interrupt's context.
    """

    __slots__ = ("_caught", "_handler")

    def __init__(self) -> None:
        self._caught: tuple[int, FrameType | None] | None = None
        self._handler: Callable[[int, FrameType | None], object] | None = None

    def __enter__(self) -> None:
        handler = _signal.getsignal(SIGINT)
        if callable(handler) and threading.get_ident() == threading.main_thread().ident:
            self._handler = handler
            _signal.signal(SIGINT, self._catch)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = (number, frame)

    def __exit__(self, *_: object) -> None:
        if self._handler is None:
            return
        _signal.signal(SIGINT, self._handler)
        if self._caught is not None:
            self._handler(*self._caught)
