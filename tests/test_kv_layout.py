"""How layers are put into groups that share block tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.kv_layout import group_layers


@pytest.mark.parametrize(
    ("windows", "groups", "sizes"),
    [
        ([None] * 4, [None], [4]),
        ([4096] * 4, [4096], [4]),  # Mistral 7B v0.1
        ([1024] * 5 + [None], [None] + [1024] * 5, [1] * 6),
        (
            ([1024] * 5 + [None]) * 10 + [1024] * 2,
            [None] + [1024] * 6,
            [10] * 6 + [2],
        ),  # Gemma 3 27B
        (([1024] * 5 + [None]) * 5 + [1024] * 4, [None] + [1024] * 6, [5] * 6 + [4] * 1),  # 4B
        ([128, None] * 12, [None, 128], [12, 12]),  # gpt-oss
        ([128] * 5 + [None] * 4, [None, 128], [4, 5]),
        ([128] * 6 + [None] * 4, [None, 128, 128], [4, 4, 2]),
        ([8, 16, None], [None, 16, 8], [1, 1, 1]),
    ],
)
def test_groups(windows: list[int | None], groups: list[int | None], sizes: list[int]) -> None:
    layout = group_layers(windows, 100)
    assert layout.windows == tuple(groups)
    assert [len(group.layers) for group in layout.groups] == sizes
    assert layout.layers_per_page == max(sizes)
    assert layout.page_bytes(16, 2) == max(sizes) * 100 * 16 * 2


@given(st.lists(st.sampled_from([None, 4, 8]), min_size=1, max_size=60))
def test_each_layer_is_in_one_group_of_its_kind(windows: list[int | None]) -> None:
    layout = group_layers(windows, 1)
    found = {layer: group.window for group in layout.groups for layer in group.layers}
    assert found == dict(enumerate(windows))
    assert sum(len(group.layers) for group in layout.groups) == len(windows)
