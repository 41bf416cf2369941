"""What flags may say; mistakes name the flag."""

from __future__ import annotations

import math

import pytest

from quire.bench.options import (
    DatasetOptions,
    LoadOptions,
    ReportOptions,
    TargetOptions,
    bench_options,
    parse_goodput,
)
from quire.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "values", "word"),
    [
        (TargetOptions, {"port": 0}, "port"),
        (TargetOptions, {"endpoint": "v1/completions"}, "endpoint"),
        (TargetOptions, {"backend": "openai", "endpoint": "/v1/chat/completions"}, "backend"),
        (TargetOptions, {"header": ("X",)}, "header"),
        (TargetOptions, {"request_timeout": 0.0}, "request_timeout"),
        (DatasetOptions, {"num_prompts": 0}, "num_prompts"),
        (DatasetOptions, {"dataset_name": "sharegpt"}, "dataset-path"),
        (DatasetOptions, {"dataset_path": "x.json"}, "dataset_path"),
        (DatasetOptions, {"random_range_ratio": 1.0}, "random_range_ratio"),
        (DatasetOptions, {"timed_trace_sec_multiplier": math.inf}, "timed_trace_sec_multiplier"),
        (DatasetOptions, {"custom_output_len": 0}, "custom_output_len"),
        (LoadOptions, {"request_rate": 0.0}, "request_rate"),
        (LoadOptions, {"request_rate": math.nan}, "request_rate"),
        (LoadOptions, {"burstiness": math.inf}, "burstiness"),
        (LoadOptions, {"max_concurrency": 0}, "max_concurrency"),
        (LoadOptions, {"ramp_up_start_rps": 1.0}, "ramp_up_start_rps"),
        (LoadOptions, {"ramp_up_strategy": "linear"}, "ramp_up_start_rps"),
        (
            LoadOptions,
            {
                "ramp_up_strategy": "linear",
                "ramp_up_start_rps": 1.0,
                "ramp_up_end_rps": 2.0,
                "request_rate": 3.0,
            },
            "request-rate",
        ),
        (ReportOptions, {"goodput": ("itl:5",)}, "goodput"),
        (ReportOptions, {"goodput": ("ttft:5", "ttft:6")}, "goodput"),
        (ReportOptions, {"metadata": ("x",)}, "metadata"),
    ],
)
def test_mistakes_are_named(kind: type, values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        kind(**values)


def test_the_dialect_follows_the_endpoint() -> None:
    assert TargetOptions(endpoint="/v1/chat/completions").chat
    assert TargetOptions(backend="openai-chat").path == "/v1/chat/completions"
    assert TargetOptions().path == "/v1/completions"
    assert TargetOptions(base_url="https://x/y/").url == "https://x/y"
    assert TargetOptions(host="::1", port=80).url == "http://[::1]:80"


def test_objectives_are_in_milliseconds() -> None:
    assert parse_goodput(("ttft:500", "tpot:50")) == {"ttft": 0.5, "tpot": 0.05}


def test_vllm_has_these_names_and_defaults() -> None:
    defaults = {info.name: info.default for info in bench_options()}
    known = {
        "host": "127.0.0.1", "port": 8000, "num_prompts": 1000, "request_rate": math.inf,
        "burstiness": 1.0, "seed": 0, "num_warmups": 0, "dataset_name": "random",
        "random_input_len": 1024, "random_output_len": 128, "random_range_ratio": 0.0,
        "prefix_repetition_num_prefixes": 10, "custom_output_len": 256,
        "timed_trace_chunk_hash_size": 16, "percentile_metrics": "ttft,tpot,itl",
        "metric_percentiles": "99", "max_concurrency": None, "temperature": None,
    }  # fmt: skip
    assert known.items() <= defaults.items()
