"""When a request repeats itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.sampling_params import RepetitionDetectionParams
from quire.scheduler.request import repeats


@given(
    st.lists(st.integers(0, 1), max_size=14),
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(2, 4),
)
def test_the_definition(
    tokens: list[int], prompt: int, shortest: int, more: int, count: int
) -> None:
    rule = RepetitionDetectionParams(shortest + more, shortest, count)
    output = tokens[prompt:]
    expected = any(
        len(output) >= size * count and output[-size * count :] == output[-size:] * count
        for size in range(shortest, shortest + more + 1)
    )
    assert repeats(tokens, len(output), rule) == expected
