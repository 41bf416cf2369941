"""Values given as text or typed: what is accepted, and that every refusal names the option."""

from __future__ import annotations

import pytest

from quire.config import engine_options, server_options
from quire.config.options import OptionInfo, check_type, parse_max_model_len, parse_size, parse_text
from quire.errors import ConfigError

ALL = {info.name: info for info in [*engine_options(), *server_options()]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("0", 0),
        ("-1", -1),
        ("4k", 4000),
        ("4K", 4096),
        ("2m", 2_000_000),
        ("2M", 2 * 2**20),
        ("1g", 10**9),
        ("1G", 2**30),
        ("25.6k", 25_600),
        ("2.3k", 2_300),
        ("1.5K", 1536),
        ("-0.5k", -500),
        (" 16 ", 16),
    ],
)
def test_parse_size_reads_what_vllm_reads(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1kk", "1 k", "0x10", "1e3", "١", "nan", "inf", "--1", "1.0001k"]
)
def test_parse_size_refuses_the_rest(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 4096"):
        parse_size(text)


def test_parse_size_does_not_hang_on_a_long_text() -> None:
    with pytest.raises(ConfigError):
        parse_size("1" * 1_000_000 + "x")


def test_max_model_len_auto() -> None:
    assert parse_max_model_len("auto") == parse_max_model_len("-1") == -1
    assert parse_max_model_len("8K") == 8192


@pytest.mark.parametrize("info", ALL.values(), ids=lambda info: info.name)
def test_every_option_is_described_and_accepts_its_own_default(info: OptionInfo) -> None:
    assert info.help.strip(), "a flag without help"
    assert info.help[0] != " "
    assert info.help.endswith("."), "help is a sentence"
    assert check_type(info, info.default) == info.default


def test_no_name_is_used_twice() -> None:
    names = [info.name for info in [*engine_options(), *server_options()]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "8000"),  # YAML `port: "8000"`: text where a number belongs
        ("port", True),
        ("port", 1.5),
        ("port", None),
        ("enable_prefix_caching", "yes"),
        ("enable_prefix_caching", 1),
        ("dtype", "int8"),
        ("dtype", None),
        ("served_model_name", [1]),
        ("served_model_name", [""]),
        ("served_model_name", 3),
        ("served_model_name", None),
        ("hf_overrides", 5),
        ("hf_overrides", ["a"]),
        ("hf_overrides", None),
        ("model", 3),
        ("shutdown_timeout", "30"),
        ("num_gpu_blocks_override", False),
    ],
)
def test_a_value_of_the_wrong_type_names_the_option(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        check_type(ALL[name], value)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("shutdown_timeout", 5, 5.0),
        ("served_model_name", ["a", "b"], ("a", "b")),
        ("served_model_name", "a", ("a",)),
        ("max_model_len", "4K", 4096),
        ("max_model_len", None, None),
        ("hf_overrides", {"a": None}, {"a": None}),
        ("hf_overrides", '{"a": [1]}', {"a": [1]}),
        ("gpu_memory_utilization", 1, 1.0),
    ],
)
def test_values_are_brought_to_their_type(name: str, value: object, kept: object) -> None:
    result = check_type(ALL[name], value)
    assert result == kept
    assert type(result) is type(kept)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "80", 80),
        ("watermark", "0.5", 0.5),
        ("host", "::1", "::1"),
        ("dtype", "float32", "float32"),
        ("hf_overrides", "{}", {}),
        ("cpu_threads", "3", 3),
    ],
)
def test_text_of_a_flag(name: str, text: str, value: object) -> None:
    assert parse_text(ALL[name], text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "http"),
        ("port", ""),
        ("watermark", "half"),
        ("dtype", "float31"),
        ("hf_overrides", "[1]"),
        ("hf_overrides", "{"),
        ("kv_cache_memory_bytes", "4 GB"),
    ],
)
def test_bad_text_of_a_flag_names_the_option(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}"):
        parse_text(ALL[name], text)
