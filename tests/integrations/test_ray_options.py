"""The application's options. Ray is not needed to check them."""

from __future__ import annotations

import pytest

from quire.errors import ConfigError
from quire.integrations.ray.options import read


def test_text_and_values_are_the_same_options(tmp_path):
    text = read({"model": "m", "max_num_seqs": "8", "enable-lora": "true", "num_gpus": "0.5"})
    value = read({"model": "m", "max_num_seqs": 8, "enable_lora": True, "num_gpus": 0.5})
    assert text == value
    assert value.engine.scheduler.max_num_seqs == 8 and value.serve.num_gpus == 0.5
    (tmp_path / "q.yaml").write_text("max-num-seqs: 8\nenable_lora: false\n")
    mixed = read(
        {"config": str(tmp_path / "q.yaml"), "enable_lora": "true", "num_gpus": 0.5, "model": "m"}
    )
    assert mixed == value


def test_vllms_names_and_vllms_options_are_read():
    config = read({"tensor_parallel_size": "2", "disable_log_requests": "true"})
    assert config.engine.parallel.tensor_parallel_size == 2
    assert "disable_log_requests" not in config.values


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_num_seq": 3}, "unknown option max_num_seq. Did you mean max_num_seqs?"),
        ({"num_replica": 3}, "unknown option num_replica. Did you mean num_replicas?"),
        ({"num_replicas": "two"}, "num_replicas must be an integer, got 'two'"),
        ({"num_replicas": 0}, "num_replicas must be at least 1, got 0"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas must be at least num_replicas"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests must be above 0"),
        ({"num_gpus": "-1"}, "num_gpus must be at least 0"),
        ({"enable_lora": "perhaps"}, "enable_lora must be true or false"),
        ({"port": 80}, "port has no effect on Ray"),
        (
            {"num_replicas": 2, "max_stored_responses": 5},
            "max_stored_responses must be 0 with several",
        ),
    ],
)
def test_what_does_not_fit_is_named(args, message):
    with pytest.raises(ConfigError, match="^" + message.replace("?", r"\?")):
        read(args)


def test_an_engine_has_as_many_threads_as_its_replica_has_cores():
    threads = [
        read(args).engine.runtime.cpu_threads
        for args in ({}, {"num_cpus": 3}, {"num_cpus": 0.5}, {"num_cpus": 3, "cpu_threads": 2})
    ]
    assert threads == [1, 3, None, 2]


def test_responses_are_stored_only_by_a_single_replica():
    assert read({}).server.max_stored_responses > 0
    assert read({}).engine.recovery.max_core_deaths == 1, "Serve replaces the replica"
    assert read({"max_core_deaths": "4"}).engine.recovery.max_core_deaths == 4
    assert read({"num_replicas": 2}).server.max_stored_responses == 0
    assert read({"max_replicas": 2}).server.max_stored_responses == 0
