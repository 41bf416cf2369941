"""Each test that docs/gpu-review.md names exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_the_named_tests_exist() -> None:
    page = (TESTS.parent / "docs" / "gpu-review.md").read_text(encoding="utf-8")
    named = set(NAMED.findall(page))
    assert len(named) > 25 and page.count("::") == len(NAMED.findall(page))
    missing = [
        f"{file}::{name}"
        for file, name in sorted(named)
        if not (TESTS / file).is_file() or f"def {name}(" not in (TESTS / file).read_text("utf-8")
    ]
    assert not missing
