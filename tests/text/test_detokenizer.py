"""Stream == whole: the deltas of any split into pushes join to the text decoded at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from quire.text import IncrementalDetokenizer, StopMatch, Tokenizer
from tests.text import builders

cuts = st.lists(st.integers(0, 80), max_size=8)
texts = st.one_of(
    st.sampled_from(builders.SAMPLES),
    st.text(max_size=40),
    st.text(alphabet="a b\n🙂👨‍👩‍👧🏽你é\u0301\u200d▁<|>", max_size=40),
)
raw_ids = st.lists(st.integers(0, 599), max_size=60)


def pushes(ids: Sequence[int], where: Sequence[int]) -> list[list[int]]:
    """`ids` cut at the given places; empty pushes stay in."""
    bounds = [0, *sorted(min(place, len(ids)) for place in where), len(ids)]
    return [list(ids[a:b]) for a, b in itertools.pairwise(bounds)]


def stream(detokenizer: IncrementalDetokenizer, parts: Sequence[Sequence[int]]) -> str:
    text = "".join(detokenizer.push(part).delta for part in parts)
    text += detokenizer.push([], final=True).delta
    assert detokenizer.text == text
    return text


def fresh_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@given(text=texts, where=cuts, skip=st.booleans())
def test_any_split_joins_to_the_decoded_text(
    any_tokenizer: Tokenizer, text: str, where: list[int], skip: bool
) -> None:
    ids = any_tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(any_tokenizer, skip_special_tokens=skip)
    streamed = stream(detokenizer, pushes(ids, where))
    assert streamed == any_tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=raw_ids, where=cuts, skip=st.booleans())
def test_byte_level_is_exact_even_for_invalid_bytes(
    byte_level: Tokenizer, ids: list[int], where: list[int], skip: bool
) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, skip_special_tokens=skip)
    assert stream(detokenizer, pushes(ids, where)) == byte_level.decode(
        ids, skip_special_tokens=skip
    )


@given(ids=raw_ids, where=cuts, skip=st.booleans())
def test_metaspace_is_exact(
    metaspace: Tokenizer, ids: list[int], where: list[int], skip: bool
) -> None:
    detokenizer = IncrementalDetokenizer(metaspace, skip_special_tokens=skip)
    whole = metaspace.decode(ids, skip_special_tokens=skip)
    assert stream(detokenizer, pushes(ids, where)) == whole


@given(ids=raw_ids, where=cuts)
@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece_unstripped", "wordpiece"])
def test_other_decoders_are_exact_wherever_text_is_valid(
    request: pytest.FixtureRequest, name: str, ids: list[int], where: list[int]
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    one_push = stream(IncrementalDetokenizer(tokenizer), [ids])
    assert stream(IncrementalDetokenizer(tokenizer), pushes(ids, where)) == one_push
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert one_push == whole
    else:  # a run with a bad byte is bad as a whole when decoded at once; its good part was out
        assert "\ufffd" in one_push
        assert len(one_push) <= len(whole)


@given(text=texts, at=st.integers(0, 40), where=cuts)
def test_output_continues_the_prompt(
    any_tokenizer: Tokenizer, text: str, at: int, where: list[int]
) -> None:
    ids = any_tokenizer.encode(text)
    prompt, output = ids[:at], ids[at:]
    whole, before = any_tokenizer.decode(ids), any_tokenizer.decode(prompt)
    assume(whole.startswith(before))  # otherwise the cut is inside a character; next test
    detokenizer = IncrementalDetokenizer(any_tokenizer, prompt_token_ids=prompt)
    assert stream(detokenizer, pushes(output, where)) == whole[len(before) :]


@given(ids=raw_ids, at=st.integers(0, 60), where=cuts)
def test_a_character_begun_in_the_prompt_is_shown_whole(
    byte_level: Tokenizer, ids: list[int], at: int, where: list[int]
) -> None:
    prompt, output = ids[:at], ids[at:]
    whole, before = byte_level.decode(ids), byte_level.decode(prompt)
    if not whole.startswith(before):
        before = before.removesuffix("\ufffd")
        assert whole.startswith(before)
    detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=prompt)
    assert stream(detokenizer, pushes(output, where)) == whole[len(before) :]


def test_begun_characters_with_byte_fallback(sentencepiece: Tokenizer) -> None:
    ids = fresh_ids(sentencepiece, "hi 🦉🦉 bye")
    bytes_at = [i for i, t in enumerate(ids) if sentencepiece.token_bytes(t) >= b"\x80"]
    assert len(bytes_at) == 8  # not in the corpus, so both are byte tokens
    first = bytes_at[0]
    for inside, expected in [(2, "🦉🦉 bye"), (4, "🦉 bye"), (6, "🦉 bye"), (8, " bye")]:
        cut = first + inside
        detokenizer = IncrementalDetokenizer(sentencepiece, prompt_token_ids=ids[:cut])
        assert stream(detokenizer, [ids[cut:]]) == expected
    # A character the output does not complete was already U+FFFD in the prompt's text.
    cut = first + 2
    other = fresh_ids(sentencepiece, " the")[-1:]
    detokenizer = IncrementalDetokenizer(sentencepiece, prompt_token_ids=ids[:cut])
    whole = sentencepiece.decode(ids[:cut] + other)
    assert stream(detokenizer, [other]) == whole.removeprefix(sentencepiece.decode(ids[:cut]))


def test_leading_space_after_a_prompt(sentencepiece: Tokenizer, metaspace: Tokenizer) -> None:
    for tokenizer in (sentencepiece, metaspace):
        the = tokenizer.token_id("▁the")
        bos = tokenizer.token_id("<s>")
        assert the is not None
        assert bos is not None
        after_word = IncrementalDetokenizer(tokenizer, prompt_token_ids=[bos, the])
        assert after_word.push([the]).delta == " the"
        at_start = IncrementalDetokenizer(tokenizer, prompt_token_ids=[bos])
        assert at_start.push([the, the]).delta == "the the"
        long_prompt = [bos, the, *[bos] * 20]  # text far back counts, specials do not
        assert IncrementalDetokenizer(tokenizer, prompt_token_ids=long_prompt).push(
            [the]
        ).delta == (" the")


def test_nothing_is_shown_before_a_character_is_complete(byte_level: Tokenizer) -> None:
    ids = [byte_level.token_id(char) for char in "ðŁĴ©"]  # the four bytes of U+1F4A9
    detokenizer = IncrementalDetokenizer(byte_level)
    deltas = [detokenizer.push([i]).delta for i in ids if i is not None]
    assert deltas == ["", "", "", "\N{PILE OF POO}"]


def test_generation_ending_inside_a_character_is_flushed(byte_level: Tokenizer) -> None:
    ids = [byte_level.token_id(char) for char in "ðŁ"]
    detokenizer = IncrementalDetokenizer(byte_level)
    result = detokenizer.push([i for i in ids if i is not None], final=True)
    assert result.delta == "\ufffd"


def test_ids_outside_the_vocabulary_are_no_text(any_tokenizer: Tokenizer) -> None:
    good = fresh_ids(any_tokenizer, "the dog")
    bad = [any_tokenizer.max_token_id + 1, 1 << 31, -1, 1 << 40]
    ids = [bad[0], *good[:1], *bad, *good[1:]]
    assert stream(IncrementalDetokenizer(any_tokenizer), [ids]) == any_tokenizer.decode(good)
    assert len(any_tokenizer.pieces(skip_special_tokens=True)) <= any_tokenizer.vocab_size


def test_spaces_between_special_tokens(wordpiece: Tokenizer) -> None:
    cls, sep = wordpiece.token_id("[CLS]"), wordpiece.token_id("[SEP]")
    the = wordpiece.token_id("the")
    ids = [i for i in (the, cls, sep, the) if i is not None]
    spaced = IncrementalDetokenizer(wordpiece, skip_special_tokens=False)
    assert stream(spaced, [ids]) == "the [CLS] [SEP] the"
    joined = IncrementalDetokenizer(
        wordpiece, skip_special_tokens=False, spaces_between_special_tokens=False
    )
    assert stream(joined, [ids]) == "the [CLS][SEP] the"


JUNK = ("Ł", "ð", "<0x80>", "<0xF0>", "<s>", "[SEP]", "<|im_end|>")


def test_junk_costs_linear_time(any_tokenizer: Tokenizer) -> None:
    """A run of bytes that never form a character, or of skipped tokens; DecodeStream needs 5 s."""
    token_ids = [i for token in JUNK if (i := any_tokenizer.token_id(token)) is not None]
    assert token_ids
    for token_id in token_ids:
        detokenizer = IncrementalDetokenizer(any_tokenizer, stop=["\n\n"])
        start = time.thread_time()
        streamed = stream(detokenizer, [[token_id]] * 8000)
        assert time.thread_time() - start < 1.0
        assert streamed == any_tokenizer.decode([token_id] * 8000)


def test_window_decoder_stays_bounded_and_exact(wordpiece: Tokenizer) -> None:
    ids = fresh_ids(wordpiece, "the quick brown fox jumps over the lazy dog. " * 50)
    assert stream(IncrementalDetokenizer(wordpiece), [[i] for i in ids]) == wordpiece.decode(ids)


# --- stop strings ---


def generate(
    tokenizer: Tokenizer, parts: Sequence[Sequence[int]], **options: object
) -> tuple[str, str | None, int]:
    """Text, stop string and number of output tokens kept."""
    detokenizer = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]
    text, kept = "", 0
    for part in parts:
        result = detokenizer.push(part)
        text += result.delta
        if result.stop is not None:
            kept += result.stop.num_tokens
            assert detokenizer.push([1, 2, 3], final=True).delta == ""
            assert detokenizer.text == text
            return text, result.stop.stop_string, kept
        kept += len(part)
    result = detokenizer.push([], final=True)
    text += result.delta
    stop = result.stop.stop_string if result.stop else None
    return text, stop, kept + (result.stop.num_tokens if result.stop else 0)


def expected_stop(
    tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], include: bool, min_tokens: int
) -> tuple[str, str | None, int]:
    """The definition, by brute force: token by token, character by character."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = ""
    for index, token_id in enumerate([*ids, None]):
        delta = (
            detokenizer.push([], final=True) if token_id is None else detokenizer.push([token_id])
        )
        num_tokens = min(index + 1, len(ids))
        for char in delta.delta:
            text += char
            ended = [stop for stop in stops if text.endswith(stop)]
            if ended and num_tokens > min_tokens:
                longest = max(ended, key=len)
                return text if include else text[: -len(longest)], longest, num_tokens
    return text, None, len(ids)


@given(
    ids=st.lists(st.integers(0, 599), max_size=40),
    text=st.text(alphabet="ab\n🙂", max_size=30),
    stops=st.lists(
        st.text(alphabet="ab\n🙂\ufffd ", min_size=1, max_size=4), min_size=1, max_size=4
    ),
    where=cuts,
    include=st.booleans(),
    min_tokens=st.integers(0, 10),
)
def test_stop_strings_do_not_depend_on_the_split(
    byte_level: Tokenizer,
    ids: list[int],
    text: str,
    stops: list[str],
    where: list[int],
    include: bool,
    min_tokens: int,
) -> None:
    ids = fresh_ids(byte_level, text) + ids + fresh_ids(byte_level, text)
    got = generate(
        byte_level,
        pushes(ids, where),
        stop=stops,
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )
    assert got == expected_stop(byte_level, ids, stops, include, min_tokens)


def test_stop_names_the_token_that_completed_it(byte_level: Tokenizer) -> None:
    before, stop, after = (fresh_ids(byte_level, text) for text in ("hello ", "User:", " more"))
    ids = [*before, *stop, *after]
    result = IncrementalDetokenizer(byte_level, stop=["User:"]).push(ids)
    assert result.delta == "hello "
    assert result.stop == StopMatch("User:", len(before) + len(stop))
    shown = IncrementalDetokenizer(byte_level, stop=["User:"], include_stop_str_in_output=True)
    assert shown.push(ids).delta == "hello User:"


def test_only_text_that_may_begin_a_stop_string_waits(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=["\nUser:"])
    deltas = [detokenizer.push(fresh_ids(byte_level, t)).delta for t in ("a", "\n", "Us", "b", "c")]
    assert deltas == ["a", "", "", "\nUsb", "c"]
    held = detokenizer.push(fresh_ids(byte_level, "\nUser"))
    assert held.delta == ""
    assert detokenizer.push([], final=True).delta == "\nUser"


def test_min_tokens_lets_a_stop_string_pass(byte_level: Tokenizer) -> None:
    ids = fresh_ids(byte_level, "a.b.c")
    assert len(ids) == 5
    assert generate(byte_level, [ids], stop=["."], min_tokens=0)[:2] == ("a", ".")
    assert generate(byte_level, [ids], stop=["."], min_tokens=2)[:2] == ("a.b", ".")
    assert generate(byte_level, [ids], stop=["."], min_tokens=4)[:2] == ("a.b.c", None)
    begun_early = generate(byte_level, [ids], stop=[".b"], min_tokens=2)
    assert begun_early[:2] == ("a", ".b")


def test_stop_string_in_skipped_special_token_is_not_seen(byte_level: Tokenizer) -> None:
    end = byte_level.token_id("<|im_end|>")
    assert end is not None
    assert generate(byte_level, [[end]], stop=["im_end"])[1] is None
    shown = generate(byte_level, [[end]], stop=["im_end"], skip_special_tokens=False)
    assert shown[:2] == ("<|", "im_end")
