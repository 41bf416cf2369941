"""Each source of requests: its rules, its lengths, and how it says what is wrong with a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.bench.datasets import BenchRequest, DatasetError, load_requests
from quire.bench.datasets.prompts import PromptMaker
from quire.bench.datasets.sharegpt import keeps, to_file
from quire.bench.options import DatasetOptions
from quire.text import Tokenizer


def load(tokenizer: Tokenizer, **values: object) -> list[BenchRequest]:
    values.setdefault("num_prompts", 20)
    return load_requests(DatasetOptions(**values), tokenizer)  # type: ignore[arg-type]


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


# --- generated ------------------------------------------------------------------------------------


def test_generated_prompts_have_exactly_the_tokens_wanted(tokenizer: Tokenizer) -> None:
    requests = load(tokenizer, random_input_len=50, random_output_len=7, random_prefix_len=9)
    assert {request.prompt_len for request in requests} == {59}
    assert {request.output_len for request in requests} == {7}
    assert all(tokenizer.encode(request.text) == request.token_ids for request in requests)
    assert len({tuple(request.token_ids[:9]) for request in requests}) == 1
    assert len({tuple(request.token_ids) for request in requests}) == 20


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(length=st.integers(1, 300), ratio=st.floats(0, 0.999), seed=st.integers(0, 2**31))
def test_random_lengths_stay_in_their_range(
    length: int, ratio: float, seed: int, tokenizer: Tokenizer
) -> None:
    requests = load(
        tokenizer, num_prompts=3, seed=seed, random_range_ratio=ratio,
        random_input_len=length, random_output_len=length,
    )  # fmt: skip
    low, high = max(math.floor(length * (1 - ratio)), 1), math.ceil(length * (1 + ratio))
    for request in requests:
        assert low <= request.prompt_len <= high and low <= request.output_len <= high


@pytest.mark.parametrize("name", ["random", "sharegpt-synthetic", "prefix_repetition"])
def test_the_seed_decides(name: str, tokenizer: Tokenizer) -> None:
    first = load(tokenizer, dataset_name=name, seed=3)
    assert first == load(tokenizer, dataset_name=name, seed=3)
    assert first != load(tokenizer, dataset_name=name, seed=4)


def test_prefixes_repeat(tokenizer: Tokenizer) -> None:
    requests = load(
        tokenizer, dataset_name="prefix_repetition", prefix_repetition_prefix_len=12,
        prefix_repetition_suffix_len=5, prefix_repetition_num_prefixes=4,
    )  # fmt: skip
    groups: dict[tuple[int, ...], int] = {}
    for request in requests:
        assert request.prompt_len == 17
        key = tuple(request.token_ids[:12])
        groups[key] = groups.get(key, 0) + 1
    assert list(groups.values()) == [5] * 4


def test_the_stand_in_has_sharegpts_lengths(tokenizer: Tokenizer) -> None:
    """Means of the published run, within what 1000 draws allow."""
    requests = load(tokenizer, dataset_name="sharegpt-synthetic", num_prompts=1000)
    assert all(keeps(r.prompt_len, r.output_len, fixed_output=False) for r in requests)
    assert sum(r.prompt_len for r in requests) / 1000 == pytest.approx(229.7, rel=0.1)
    assert sum(r.output_len for r in requests) / 1000 == pytest.approx(203.1, rel=0.1)


def test_a_tokenizer_without_words_still_works(tokenizer: Tokenizer) -> None:
    maker = PromptMaker(tokenizer, 0, send_ids=True)
    maker.exact = False
    ids = maker.draw(12)
    assert maker.prompt(ids)[1] == ids


# --- ShareGPT -------------------------------------------------------------------------------------


def turns(*values: str) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": value} for value in values]}


def test_vllms_filter() -> None:
    assert not keeps(3, 50, fixed_output=False)
    assert keeps(4, 4, fixed_output=False)
    assert not keeps(4, 3, fixed_output=False)
    assert keeps(4, 1, fixed_output=True)
    assert keeps(1024, 1024, fixed_output=False)
    assert not keeps(1025, 4, fixed_output=False)
    assert not keeps(1000, 1049, fixed_output=False)


def test_sharegpt_takes_the_first_two_turns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = "what does the function return when " * 2
    entries = [
        turns(long + "a", long, "third turn"),
        turns(long + "only one turn"),
        turns("hi", long),
        turns(long + "b", "no"),
        turns(long * 200, long),
    ]
    path = write(tmp_path / "s.json", entries)
    options = {"dataset_name": "sharegpt", "dataset_path": path, "no_oversample": True}
    (request,) = load(tokenizer, **options)
    assert request.text == long + "a"
    assert request.output_len == len(tokenizer.encode(long, add_special_tokens=False))
    fixed = load(tokenizer, **options, sharegpt_output_len=2)
    assert sorted(r.text[-1] for r in fixed) == ["a", "b"]
    assert {r.output_len for r in fixed} == {2}


def test_entries_repeat_unless_not_wanted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", [turns("some words of a prompt", "some words of an answer")])
    options = {"dataset_name": "sharegpt", "dataset_path": path, "num_prompts": 3}
    assert len(load(tokenizer, **options)) == 3
    assert len(load(tokenizer, **options, no_oversample=True)) == 1


def test_the_stand_in_survives_its_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = DatasetOptions(dataset_name="sharegpt-synthetic", num_prompts=30)
    path = tmp_path / "s.json"
    path.write_text(to_file(options, tokenizer))
    made = load_requests(options, tokenizer)
    read = load(
        tokenizer, dataset_name="sharegpt", dataset_path=str(path), num_prompts=30,
        disable_shuffle=True,
    )  # fmt: skip
    assert made == read


# --- custom and traces ----------------------------------------------------------------------------


def test_custom_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {"prompt": "one", "output_tokens": 9}, "", {"prompt": "two"})
    requests = load(
        tokenizer, dataset_name="custom", dataset_path=path, no_oversample=True,
        disable_shuffle=True, custom_output_len=5,
    )  # fmt: skip
    assert [(r.text, r.output_len) for r in requests] == [("one", 9), ("two", 5)]


def test_a_trace_keeps_times_and_shared_prefixes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"timestamp": 3000, "input_length": 20, "output_length": 4, "hash_ids": [1, 2, 3]},
        {"timestamp": 1000, "input_length": 24, "output_length": 5, "hash_ids": [1, 2, 9]},
        {"timestamp": 1500, "input_length": 10, "output_length": 6},
    )
    requests = load(
        tokenizer, dataset_name="timed_trace", dataset_path=path,
        timed_trace_sec_multiplier=0.001, timed_trace_chunk_hash_size=8,
    )  # fmt: skip
    assert [r.due for r in requests] == [0.0, 0.5, 2.0]
    assert [r.prompt_len for r in requests] == [24, 10, 20]
    assert [r.output_len for r in requests] == [5, 6, 4]
    assert requests[0].token_ids[:16] == requests[2].token_ids[:16]
    assert requests[0].token_ids[16:20] != requests[2].token_ids[16:20]


# --- what is wrong with a file --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("sharegpt", '[\n{"conversations": [}\n]', "line 2 is not JSON"),
        ("sharegpt", "{}", "must be a JSON array"),
        ("sharegpt", "[3]", "entry 1 must be an object"),
        ("sharegpt", '[{"conversations": [{"value": 3}]}]', "entry 1: each turn"),
        ("sharegpt", "[]", "no request that passes"),
        ("sharegpt", "[" * 100_000, "is not JSON"),
        ("custom", '{"prompt": "x"}\n{"prompt": 3}', "line 2: prompt must be"),
        ("custom", '{"prompt": "x"}\n\n{', "line 3 is not JSON"),
        ("custom", "[]", "line 1 must be a JSON object"),
        ("custom", '{"prompt": "x", "output_tokens": 0}', "line 1: output_tokens must be"),
        ("custom", '{"prompt": "x", "output_tokens": true}', "line 1: output_tokens must be"),
        ("custom", "", "no request that passes"),
        ("timed_trace", '{"timestamp": "x"}', "line 1: timestamp"),
        ("timed_trace", '{"timestamp": NaN}', "line 1: timestamp must be finite"),
        ("timed_trace", '{"timestamp": 0, "input_length": 4}', "line 1: output_length"),
        (
            "timed_trace",
            '{"timestamp": 0, "input_length": 4, "output_length": 4, "hash_ids": ["a"]}',
            "line 1: hash_ids",
        ),
    ],
)
def test_a_bad_file_is_named_with_the_place(
    name: str, text: str, says: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(DatasetError, match=says) as caught:
        load(tokenizer, dataset_name=name, dataset_path=str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_and_one_that_is_not_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        load(tokenizer, dataset_name="custom", dataset_path=str(tmp_path / "none"))
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="not UTF-8"):
        load(tokenizer, dataset_name="custom", dataset_path=str(path))
