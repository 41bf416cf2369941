"""A progress bar for loading a large model."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import TracebackType

WORTH_A_BAR = 256 << 20
"""Bytes. A smaller model is loaded before a bar could be read."""


class LoadProgress:
    """tqdm's bar on standard error, if that is a terminal and the model is large; otherwise nothing."""

    def __init__(self, num_bytes: int) -> None:
        self._stack = ExitStack()
        self.add = _ignore
        if num_bytes >= WORTH_A_BAR and sys.stderr.isatty():
            from tqdm import tqdm

            bar = tqdm(
                total=num_bytes, desc="loading weights", unit="B", unit_scale=True, leave=False
            )
            self.add = self._stack.enter_context(bar).update

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def _ignore(num_bytes: int) -> object:
    return None
