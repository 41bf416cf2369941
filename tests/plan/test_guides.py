"""The guides' numbers: what is right by hand, and that docs/plan.md has what `quire plan` says today."""

from __future__ import annotations

import pytest

from tests.plan import guides

ROWS = list(guides.rows())


@pytest.mark.parametrize("row", ROWS, ids=[row.says for row in ROWS])
def test_a_row(row: guides.Row) -> None:
    for check in row.checks:
        assert check.computed == pytest.approx(check.by_hand, rel=0.01), check


def test_there_is_a_row_for_each_of_the_reference() -> None:
    assert [row.says[0] for row in ROWS] == ["0"] * 5 + ["1"] * 8 + ["3"] * 3


def test_the_page_has_the_table_of_today() -> None:
    """Mend: python -m tests.plan.guides"""
    text = guides.PAGE.read_text(encoding="utf-8")
    assert guides.page(text) == text
