"""Every rule of every config, the flat form, and YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quire.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    ServerConfig,
    from_flat,
    load_yaml,
    server_from_flat,
    split_flat,
)
from quire.config.foreign import without_foreign
from quire.errors import ConfigError

NAN = float("nan")


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (ModelConfig, {"max_model_len": 0}),
        (ModelConfig, {"max_model_len": -2}),
        (ModelConfig, {"max_logprobs": -2}),
        (ModelConfig, {"model": ""}),
        (CacheConfig, {"block_size": 0}),
        (CacheConfig, {"block_size": 17}),
        (CacheConfig, {"gpu_memory_utilization": 0.0}),
        (CacheConfig, {"gpu_memory_utilization": 1.01}),
        (CacheConfig, {"gpu_memory_utilization": NAN}),
        (CacheConfig, {"kv_cache_memory_bytes": 0}),
        (CacheConfig, {"num_gpu_blocks_override": 1}),
        (CacheConfig, {"watermark": 1.0}),
        (CacheConfig, {"watermark": -0.1}),
        (CacheConfig, {"watermark": NAN}),
        (SchedulerConfig, {"max_num_seqs": 0}),
        (SchedulerConfig, {"max_num_batched_tokens": 0}),
        (SchedulerConfig, {"long_prefill_token_threshold": -1}),
        (SchedulerConfig, {"max_num_queued_reqs": -1}),
        (SchedulerConfig, {"max_num_queued_tokens": -1}),
        (RuntimeConfig, {"cpu_threads": 0}),
        (ServerConfig, {"port": -1}),
        (ServerConfig, {"port": 65536}),
        (ServerConfig, {"shutdown_timeout": -1.0}),
        (ServerConfig, {"shutdown_timeout": NAN}),
        (ServerConfig, {"health_timeout": -1.0}),
        (ServerConfig, {"sse_keep_alive_interval": NAN}),
        (ServerConfig, {"log_stats_interval": 0.0}),
        (ServerConfig, {"max_body_bytes": 0}),
        (ServerConfig, {"max_prompts_per_request": 0}),
        (ServerConfig, {"ssl_keyfile": "k.pem"}),
        (ServerConfig, {"ssl_certfile": "c.pem"}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(config: type, values: dict[str, object]) -> None:
    [name] = values
    with pytest.raises(ConfigError, match=name):
        config(**values)


def test_the_budget_must_let_every_running_request_advance() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(8\).*max_num_seqs \(16\)"):
        SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=8)
    SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=8)


def test_configs_are_frozen() -> None:
    config = EngineConfig()
    for name in ("model", "cache", "scheduler", "runtime"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cache.block_size = 32  # type: ignore[misc]


def test_two_configs_do_not_share_a_dict() -> None:
    one, two = ModelConfig(), ModelConfig()
    one.hf_overrides["x"] = 1
    assert two.hf_overrides == {}


def test_flat_names_reach_their_groups() -> None:
    config = from_flat({"model": "m", "block_size": 32, "max_num_seqs": 4, "cpu_threads": 1})
    assert config.model.model == "m"
    assert config.cache.block_size == 32
    assert config.scheduler.max_num_seqs == 4
    assert config.runtime.cpu_threads == 1
    assert from_flat({}) == EngineConfig()


def test_unknown_names_are_errors_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"unknown option max_model_length.*max_model_len\?"):
        from_flat({"max_model_length": 3})
    with pytest.raises(ConfigError, match=r"^unknown option qqqq\.$"):
        from_flat({"qqqq": 3})
    with pytest.raises(ConfigError, match=r"unknown option prot.*port\?"):
        server_from_flat({"prot": 3})
    with pytest.raises(ConfigError, match=r"unknown option prot.*port\?"):
        split_flat({"prot": 3})


def test_an_engine_takes_no_server_option() -> None:
    with pytest.raises(ConfigError, match="unknown option port"):
        from_flat({"port": 8000})


def test_split_flat_builds_both() -> None:
    engine, server = split_flat({"port": 9, "seed": 7, "api_key": ["a"]})
    assert (engine.model.seed, server.port, server.api_key) == (7, 9, ("a",))


def test_yaml_keys_may_have_dashes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("max-model-len: 4K\nserved_model_name: [a, b]\nhf-overrides: {x-y: 1}\n")
    values = load_yaml(path)
    assert values["hf_overrides"] == {"x-y": 1}, "only option names are respelled"
    config = from_flat(values)
    assert config.model.max_model_len == 4096
    assert config.model.served_model_name == ("a", "b")


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# nothing yet\n")
    assert load_yaml(path) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"- a\n- b\n",
        b"just text",
        b"1: x\n",
        b"a: [1\n",
        b"\xff\xfe\x00",
        b"a: !!python/object/apply:os.getcwd []\n",
    ],
)
def test_a_yaml_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config file .*c\.yaml"):
        load_yaml(path)


def test_a_missing_yaml_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)


def test_copies_are_on_one_machine() -> None:
    with pytest.raises(ConfigError, match="one machine"):
        from_flat({"data_parallel_size": 2, "tensor_parallel_size": 2, "nnodes": 2})


@pytest.mark.parametrize("option", ["data_parallel_rank", "data_parallel_external_lb"])
def test_vllms_outside_balancing_is_refused_by_name(option: str) -> None:
    with pytest.raises(ConfigError, match="balancer"):
        without_foreign({option: True})
