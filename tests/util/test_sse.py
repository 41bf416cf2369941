"""The stream parser gives the same events however the bytes were cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from quire.util.sse import SseParser

PIECES = st.sampled_from(
    [b"data: one\n\n", b"data:two\r\n\r\n", b"data: three\r\r", b"data: a\ndata: b\n\n", b": note\n",
     b"event: x\n", b"id: 4\r\n", b"\n", b"\r\n", b"data\n\n", b"data: \n\n", b"data: \xc3\xa9{}\n\n",
     b"data: [DONE]\n\n", b"retry: 5\n\n", b"junk\n"]
)  # fmt: skip


def parse(parts: list[bytes]) -> list[bytes]:
    parser = SseParser()
    return [event for part in parts for event in parser.feed(part)]


@given(st.booleans(), st.lists(PIECES, max_size=12), st.data())
def test_every_split_gives_the_events_of_the_whole(
    bom: bool, pieces: list[bytes], data: st.DataObject
) -> None:
    stream = (b"\xef\xbb\xbf" if bom else b"") + b"".join(pieces) + b": end\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    edges = [0, *cuts, len(stream)]
    parts = [stream[a:b] for a, b in itertools.pairwise(edges)]
    assert parse(parts) == parse([stream])
    assert parse([bytes([byte]) for byte in stream]) == parse([stream])


def test_lines_ends_comments_and_joined_data() -> None:
    stream = b": hello\n\ndata: a\ndata:b\nevent: z\n\ndata: c\r\n\r\ndata: d\r\r: end\n"
    assert parse([stream]) == [b"a\nb", b"c", b"d"]


def test_one_event_a_read_and_several() -> None:
    assert parse([b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\ndata: 4\n\n"]) == [
        b"1",
        b"2",
        b"3",
        b"4",
    ]
