"""What a decoding step of a GPU asks of the host, in counts: nothing here reads a clock."""

from __future__ import annotations

from typing import Any

import pytest
from bench.device_host import decoding, null_core
from torch.utils._python_dispatch import TorchDispatchMode

from quire.engine.core import EngineCore


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations; each is a launch, a copy or an allocation, of one to ten microseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations(core: EngineCore) -> list[str]:
    with Operations() as counted:
        core.step()
    return counted.names


@pytest.mark.parametrize("rows", [1, 40])
def test_a_step_with_a_graph_asks_little_of_torch(rows: int) -> None:
    """However many rows: the copy of the inputs, the sum of tokens and flags, and the copy of that."""
    core = null_core(rows)
    decoding(core, rows)
    found = [operations(core) for _ in range(6)]
    made = [name for name in min(found, key=len) if not name.startswith(("view", "slice", "alias"))]
    assert len(made) <= 8, made
    assert max(map(len, found)) < 30
