from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.engine.checkpoints import ServableCheckpoint, write_checkpoint


@pytest.fixture(scope="session")
def servable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ServableCheckpoint]:
    """A variant's servable checkpoint, written once per session."""

    @cache
    def make(name: str) -> ServableCheckpoint:
        return write_checkpoint(name, tmp_path_factory.mktemp(f"servable-{name}"))

    return make
