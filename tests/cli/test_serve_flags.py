"""From the words after `quire serve` to the two configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.cli.serve import configs
from quire.config import engine_options, server_options
from quire.config.options import OptionInfo
from quire.errors import ConfigError

ALL = [*engine_options(), *server_options()]


def test_no_words_give_the_defaults() -> None:
    engine, server = configs([])
    assert engine.model.model is None
    assert server.port == 8000


def test_vllm_spellings() -> None:
    engine, server = configs(
        "some/model --max_model_len 4k --port=9000 --no-enable-prefix-caching"
        " --served-model-name a b --gpu-memory-utilization .5 --enforce-eager".split()
    )
    assert engine.model.model == "some/model"
    assert engine.model.max_model_len == 4000
    assert engine.model.served_model_name == ("a", "b")
    assert engine.cache.enable_prefix_caching is False
    assert engine.cache.gpu_memory_utilization == 0.5
    assert engine.runtime.enforce_eager is True
    assert server.port == 9000


def test_values_keep_their_underscores() -> None:
    engine, _ = configs(["my_model", "--served_model_name=my_name", "--hf_overrides", '{"a_b": 1}'])
    assert engine.model.model == "my_model"
    assert engine.model.served_model_name == ("my_name",)
    assert engine.model.hf_overrides == {"a_b": 1}


def test_a_negative_value_needs_no_equals_sign() -> None:
    assert configs(["--max-model-len", "-1"])[0].model.max_model_len == -1


@pytest.mark.parametrize("words", [["a", "--port", "1"], ["--port", "1", "a"]])
def test_the_model_may_stand_anywhere(words: list[str]) -> None:
    assert configs(words)[0].model.model == "a"


def test_the_positional_model_wins() -> None:
    assert configs(["pos", "--model", "flag"])[0].model.model == "pos"
    assert configs(["--model", "flag"])[0].model.model == "flag"


def test_flags_win_over_yaml_wins_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("port: 1\nmax-num-seqs: 2\nmodel: from-yaml\nenable-prefix-caching: false\n")
    engine, server = configs(["--config", str(path), "--port", "3", "--enable-prefix-caching"])
    assert (server.port, engine.scheduler.max_num_seqs) == (3, 2)
    assert engine.cache.enable_prefix_caching is True
    assert engine.model.model == "from-yaml"
    assert configs(["cli", "--config", str(path)])[0].model.model == "cli"


def test_yaml_is_as_strict_as_flags(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("prot: 1\n")
    with pytest.raises(ConfigError, match=r"prot.*Did you mean port\?"):
        configs(["--config", str(path)])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--prot", "1"], "unknown flag --prot. Did you mean --port?"),
        (["--max-model", "1"], "unknown flag --max-model. Did you mean --max-model-len?"),
        (["--zzzzzzz"], "unknown flag --zzzzzzz. "),
        (["a", "b"], "unexpected argument 'b'"),
        (["--port"], "argument --port: expected one argument"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        configs(words)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


LORA = ("--enable-lora",)
NGRAM = ("--speculative-config", '{"method": "ngram"}')
WITH = {
    "lora_modules": LORA,
    "lora_dir": LORA,
    "spec_tokens": NGRAM,
    "ngram_prompt_lookup_max": NGRAM,
    "ngram_prompt_lookup_min": NGRAM,
    "nnodes": ("-tp", "2"),
    "node_rank": ("-tp", "2", "--nnodes", "2"),
    "headless": ("-tp", "2", "--nnodes", "2", "--node-rank", "1"),
    "kv_disk_size": ("--kv-disk-path", "/directory"),
    "admin_metrics": ("--admin-port", "8001"),
}
"""Flags without which an option is an error."""
LEGAL = {
    "speculative_config": '{"method": "suffix"}',
    "spec_method": "suffix",
    "spec_tokens": "4",
    "lora_modules": "name=/directory",
    "kv_transfer_config": '{"kv_connector": "TCPConnector", "kv_role": "kv_both"}',
    "kv_events_config": '{"enable_kv_cache_events": true}',
}
CHANGEABLE = [info for info in ALL if len(info.choices or "ab") > 1]


@pytest.mark.parametrize("info", CHANGEABLE, ids=lambda info: info.name)
def test_every_option_is_a_flag(info: OptionInfo) -> None:
    """Each flag sets its own field and no other."""
    value = _other_value(info)
    words = [f"--no-{info.flag[2:]}" if value is False else info.flag]
    if not info.is_bool:
        words.append(str(value))
    if info.name in ("ssl_keyfile", "ssl_certfile"):  # they come as a pair
        words = ["--ssl-keyfile", str(value), "--ssl-certfile", str(value)]
    others = WITH.get(info.name, ())
    changed = _flat(configs([*others, *words]))
    default = _flat(configs([*others]))
    differing = {name for name in changed if changed[name] != default[name]}
    expected = {info.name}
    if info.name in ("ssl_keyfile", "ssl_certfile"):
        expected = {"ssl_keyfile", "ssl_certfile"}
    assert differing == expected


def _other_value(info: OptionInfo) -> object:
    """A legal value that is not the default."""
    if info.name in LEGAL:
        return LEGAL[info.name]
    if info.is_bool:
        return not info.default
    if info.choices:
        return next(choice for choice in info.choices if choice != info.default)
    if info.metavar == "JSON":
        return '{"x": 1}'
    if info.name == "cpu_activation_bits":
        return 8
    if info.name == "block_size":
        return 32
    if info.name == "max_sequences_per_request":  # its default is the most
        return 1
    if info.default is None or info.default == () or isinstance(info.default, str | tuple):
        text = info.type is str or "str" in str(info.type)
        return "word" if text else "1" if "float" in str(info.type) else "4096"
    if isinstance(info.default, float):
        return info.default / 2 or 1.0
    return int(str(info.default)) + 1


def _flat(pair: tuple[object, object]) -> dict[str, object]:
    engine, server = pair
    values: dict[str, object] = {}
    for info in ALL:
        holder = server if info.group == "server" else getattr(engine, info.group)
        values[info.name] = getattr(holder, info.name)
    return values
