"""`interpreted` runs with TRITON_INTERPRET=1 and `compiled` without: see scripts/test-triton."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent

if INTERPRETING:
    from tests.triton.harness import fix_interpreter

    fix_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    other, reason = (
        (HERE / "compiled", "needs TRITON_INTERPRET unset")
        if INTERPRETING
        else (HERE / "interpreted", "needs TRITON_INTERPRET=1")
    )
    for item in items:
        if other in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"{reason}: run scripts/test-triton"))
