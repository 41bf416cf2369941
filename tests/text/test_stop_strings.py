"""The stop-string scanner alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import InvalidParameterError
from quire.text.stop_strings import MAX_STOP_CHARS, StopStringScanner

alphabet = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), min_size=1, max_size=5)


def scan(
    stops: Sequence[str], deltas: Sequence[str], *, include: bool = False
) -> tuple[str, str | None]:
    scanner = StopStringScanner(stops, include=include)
    out = ""
    for delta in deltas:
        out += scanner.feed(delta)
        if scanner.matched is not None:
            return out, scanner.matched
    return out + scanner.flush(), None


@given(text=alphabet, stops=stop_lists, include=st.booleans(), cuts=st.sets(st.integers(0, 30)))
def test_first_completed_then_longest(
    text: str, stops: list[str], include: bool, cuts: set[int]
) -> None:
    expected: tuple[str, str | None] = (text, None)
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            expected = (text[:end] if include else text[: end - len(longest)], longest)
            break
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    deltas = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert scan(stops, deltas, include=include) == expected


@given(text=alphabet, stops=stop_lists)
def test_holds_back_exactly_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    scanner = StopStringScanner(stops)
    out = ""
    for index, char in enumerate(text):
        out += scanner.feed(char)
        if scanner.matched is not None:
            return
        seen = text[: index + 1]
        prefixes = {stop[:n] for stop in stops for n in range(len(stop))}
        held = max(len(p) for p in prefixes if seen.endswith(p))
        assert out == seen[: len(seen) - held]


@given(text=alphabet, stops=stop_lists)
def test_unarmed_text_passes_whole(text: str, stops: list[str]) -> None:
    scanner = StopStringScanner(stops)
    out = "".join(scanner.feed(char, armed=False) for char in text)
    assert scanner.matched is None
    assert len(text) - len(out) < max(map(len, stops))
    assert out + scanner.flush() == text


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("a" * 5000 + "b", "a"),
        ("ab" * 2500 + "c", "ab"),
        ("a" * 5000, "ab"),
    ],
)
def test_time_is_linear_for_adversarial_stop_strings(stop: str, text: str) -> None:
    scanner = StopStringScanner([stop, stop[1:], stop[2:]])
    start = time.thread_time()
    out = "".join(scanner.feed(text) for _ in range(20_000)) + scanner.flush()
    assert time.thread_time() - start < 2.0
    assert out == text * 20_000


@pytest.mark.parametrize("stops", [[""], ["a", ""], ["x" * (MAX_STOP_CHARS + 1)], [5]])
def test_bad_stop_strings(stops: list[str]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        StopStringScanner(stops)
    assert caught.value.param == "stop"
