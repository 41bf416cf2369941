from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from quire.scheduler.cost_model import CostModel
from tests.engine.checkpoints import ServableCheckpoint, write_checkpoint


@pytest.fixture(scope="session")
def servable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ServableCheckpoint]:
    """A variant's servable checkpoint, written once per session."""

    @cache
    def make(name: str) -> ServableCheckpoint:
        return write_checkpoint(name, tmp_path_factory.mktemp(f"servable-{name}"))

    return make


@pytest.fixture(scope="module")
def loads_pay() -> Iterator[None]:
    """In this process, whatever is found in a tier or at a peer is loaded. Else small models compute their
    prompts again where that takes less time, as measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostModel, "prompt_seconds", lambda self, count, start=0.0: 1.0 * count)
        yield
