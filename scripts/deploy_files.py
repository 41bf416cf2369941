"""deploy/helm/quire: the schema of its values, from values.yaml and the options of `quire serve`; and the dashboards.

Written by scripts/gen_docs.py.
"""

# ruff: noqa: E501 - rows of tables are as long as they are

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from quire.config import engine_options, server_options

CHART = Path(__file__).resolve().parent.parent / "deploy/helm/quire"

# --- the schema: closed maps, types of the defaults -------------------------------------------------

NOT_IN_CONFIG = {
    "admin_api_key",
    "admin_host",
    "admin_metrics",
    "admin_port",
    "admin_uds",
    "api_key",
    "api_keys_file",
    "hf_token",
    "port",
    "uds",
    "kv_transfer_config",
    "kv_disk_path",
}
"""Secrets, and what the chart itself decides. Its ServiceMonitor asks the API's port for /metrics."""
POSITIVE = {"type": "integer", "minimum": 1}
PERCENT_OR_COUNT = {"type": ["integer", "string"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "profile": {"enum": ["cpu", "gpu"]},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "admin.port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "service.port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "inferencePool.endpointPickerPort": {"type": "integer", "minimum": 1, "maximum": 65535},
    "inferencePool.failureMode": {"enum": ["FailOpen", "FailClose"]},
    "disaggregation.kvPort": {"type": "integer", "minimum": 1, "maximum": 65535},
    "disaggregation.podNetwork": {"type": "string", "pattern": "^([0-9a-fA-F.:]+/[0-9]+)?$"},
    "disaggregation.prefill.replicas": POSITIVE,
    "disaggregation.decode.replicas": POSITIVE,
    "disaggregation.proxy.replicas": POSITIVE,
    "disaggregation.proxy.resources": {"type": "object"},
    "podDisruptionBudget.maxUnavailable": PERCENT_OR_COUNT,
    "startupSeconds": POSITIVE,
    "shutdown.preStopSeconds": POSITIVE,
    "kvDisk.size": POSITIVE,
    "dashboards.labels": {"type": "object"},
    "autoscaling.maxReplicas": POSITIVE,
    "autoscaling.kvUsage": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "prometheusRule.alerts": {
        "type": "object",
        "additionalProperties": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "enabled": {"type": "boolean"},
                "threshold": {"type": "number", "minimum": 0},
                "for": {"type": "string"},
                "severity": {"type": "string"},
            },
        },
    },
}


def values_schema() -> str:
    options = {info.name for info in [*engine_options(), *server_options()]} - NOT_IN_CONFIG
    overrides = dict(OVERRIDES)
    for name in ("config", "disaggregation.prefill.config", "disaggregation.decode.config"):
        overrides[name] = {"type": "object", "propertyNames": {"enum": sorted(options)}}
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = _schema(values, "", overrides)
    schema["properties"]["global"] = {"type": "object"}
    if overrides:
        raise ValueError(f"no such values: {', '.join(overrides)}")
    return (
        json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **schema}, indent=1)
        + "\n"
    )


def _schema(value: object, path: str, overrides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if path in overrides:
        return overrides.pop(path)
    if isinstance(value, dict) and value:
        properties = {
            name: _schema(each, f"{path}.{name}".lstrip("."), overrides)
            for name, each in value.items()
        }
        return {"type": "object", "additionalProperties": False, "properties": properties}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer", "minimum": 0}
    kinds: dict[type, str] = {dict: "object", list: "array", str: "string", float: "number"}
    return {"type": kinds[type(value)]}


# --- the dashboards -----------------------------------------------------------------------------------

SERVER = 'job="quire", model_name=~"$model_name", instance=~"$instance"'
PROXY = 'job="quire"'
QUANTILES = (0.5, 0.95, 0.99)
Panel = tuple[str, str, str, list[tuple[str, str]]]
"""Title, kind (stat or timeseries), unit, queries with their legends."""


def rate(metric: str, by: str = "", more: str = "") -> str:
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({metric}{{{SERVER}{more}}}[$__rate_interval]))"


def gauge(metric: str, by: str = "instance", how: str = "sum") -> str:
    return f"{how} by ({by}) ({metric}{{{SERVER}}})"


def quantiles(metric: str, labels: str = SERVER) -> list[tuple[str, str]]:
    inner = f"sum by (le) (rate({metric}_bucket{{{labels}}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {inner})", f"p{q * 100:g}") for q in QUANTILES]


HTTP = 'job="quire", instance=~"$instance", handler=~"/v1/.*"'
DASHBOARDS: dict[str, tuple[str, list[tuple[str, list[Panel]]]]] = {
    "quire-serving": (
        "Quire: serving",
        [
            (
                "Now",
                [
                    ("Requests", "stat", "reqps", [(rate("vllm:request_success_total"), "")]),
                    ("Generated tokens/s", "stat", "short", [(rate("vllm:generation_tokens_total"), "")]),
                    ("Running", "stat", "short", [(f"sum (vllm:num_requests_running{{{SERVER}}})", "")]),
                    ("Waiting", "stat", "short", [(f"sum (vllm:num_requests_waiting{{{SERVER}}})", "")]),
                    ("KV cache in use", "stat", "percentunit", [(f"avg (vllm:kv_cache_usage_perc{{{SERVER}}})", "")]),
                    ("Servers up", "stat", "short", [('sum (up{job="quire"})', "")]),
                ],
            ),
            (
                "Latency",
                [
                    ("Time to first token", "timeseries", "s", quantiles("vllm:time_to_first_token_seconds")),
                    ("Time between tokens", "timeseries", "s", quantiles("vllm:inter_token_latency_seconds")),
                    ("Whole request", "timeseries", "s", quantiles("vllm:e2e_request_latency_seconds")),
                    ("In the queue", "timeseries", "s", quantiles("vllm:request_queue_time_seconds")),
                    ("Prefill", "timeseries", "s", quantiles("vllm:request_prefill_time_seconds")),
                    ("Decode", "timeseries", "s", quantiles("vllm:request_decode_time_seconds")),
                ],
            ),
            (
                "Load",
                [
                    (
                        "Requests",
                        "timeseries",
                        "short",
                        [
                            (gauge("vllm:num_requests_running"), "{{instance}} running"),
                            (gauge("vllm:num_requests_waiting"), "{{instance}} waiting"),
                        ],
                    ),
                    (
                        "Waiting, by reason",
                        "timeseries",
                        "short",
                        [(gauge("vllm:num_requests_waiting_by_reason", "reason"), "{{reason}}")],
                    ),
                    (
                        "Tokens/s",
                        "timeseries",
                        "short",
                        [
                            (rate("vllm:prompt_tokens_total"), "prompt"),
                            (rate("vllm:generation_tokens_total"), "generated"),
                        ],
                    ),
                    (
                        "Tokens of a step",
                        "timeseries",
                        "short",
                        [
                            (
                                f"{rate('vllm:iteration_tokens_total_sum')} / {rate('vllm:iteration_tokens_total_count')}",
                                "mean",
                            )
                        ],
                    ),
                    ("Prompt length", "timeseries", "short", quantiles("vllm:request_prompt_tokens")),
                    ("Answer length", "timeseries", "short", quantiles("vllm:request_generation_tokens")),
                    ("Wait of a request that comes now", "timeseries", "s", [(gauge("quire:estimated_wait_seconds"), "{{instance}}")]),
                    ("Prompt tokens in the queue", "timeseries", "short", [(gauge("quire:queue_tokens"), "{{instance}}")]),
                    (
                        "Time of a step",
                        "timeseries",
                        "s",
                        [
                            (gauge("quire:step_predicted_seconds", how="max"), "{{instance}} predicted"),
                            (gauge("quire:step_target_seconds", how="max"), "{{instance}} target"),
                        ],
                    ),
                ],
            ),
            (
                "Trouble",
                [
                    (
                        "Requests ended, by reason",
                        "timeseries",
                        "reqps",
                        [(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")],
                    ),
                    (
                        "HTTP answers",
                        "timeseries",
                        "reqps",
                        [(f"sum by (status) (rate(http_requests_total{{{HTTP}}}[$__rate_interval]))", "{{status}}")],
                    ),
                    (
                        "Refused: the queue is full",
                        "timeseries",
                        "reqps",
                        [(rate("vllm:admission_rejections_total", "reason"), "{{reason}}")],
                    ),
                    ("Preemptions/s", "timeseries", "short", [(rate("vllm:num_preemptions_total"), "")]),
                    (
                        "Engine cores started again",
                        "timeseries",
                        "short",
                        [
                            (f"sum by (instance) (increase(quire:core_restarts_total{{{SERVER}}}[$__rate_interval]))", "{{instance}}"),
                            (f"sum by (instance) (increase(quire:poison_requests_total{{{SERVER}}}[$__rate_interval]))", "{{instance}} refused requests"),
                        ],
                    ),
                    (
                        "Memory of the front end",
                        "timeseries",
                        "bytes",
                        [('sum by (instance) (process_resident_memory_bytes{job="quire", instance=~"$instance"})', "{{instance}}")],
                    ),
                    (
                        "Open file descriptors",
                        "timeseries",
                        "short",
                        [('sum by (instance) (process_open_fds{job="quire", instance=~"$instance"})', "{{instance}}")],
                    ),
                ],
            ),
            (
                "Tenants",
                [
                    (
                        "Requests in flight",
                        "timeseries",
                        "short",
                        [('sum by (tenant) (quire:tenant_requests{job="quire", instance=~"$instance"})', "{{tenant}}")],
                    ),
                    (
                        "Refused by a quota",
                        "timeseries",
                        "reqps",
                        [
                            (
                                'sum by (tenant, quota) (rate(quire:quota_refusals_total{job="quire", instance=~"$instance"}[$__rate_interval]))',
                                "{{tenant}} {{quota}}",
                            )
                        ],
                    ),
                ],
            ),
            (
                "Speculative decoding",
                [
                    (
                        "Drafts accepted",
                        "timeseries",
                        "percentunit",
                        [
                            (
                                f"{rate('vllm:spec_decode_num_accepted_tokens_total')} / {rate('vllm:spec_decode_num_draft_tokens_total')}",
                                "share",
                            )
                        ],
                    ),
                    (
                        "Tokens of a verification",
                        "timeseries",
                        "short",
                        [
                            (
                                f"1 + {rate('vllm:spec_decode_num_accepted_tokens_total')} / {rate('vllm:spec_decode_num_drafts_total')}",
                                "mean",
                            )
                        ],
                    ),
                ],
            ),
        ],
    ),
    "quire-kv": (
        "Quire: KV cache",
        [
            (
                "Cache",
                [
                    ("In use", "timeseries", "percentunit", [(gauge("vllm:kv_cache_usage_perc", how="avg"), "{{instance}}")]),
                    (
                        "Prompt tokens found",
                        "timeseries",
                        "percentunit",
                        [
                            (
                                f"{rate('vllm:prompt_tokens_cached_total')} / {rate('vllm:prompt_tokens_total')}",
                                "share",
                            )
                        ],
                    ),
                    (
                        "Prompt tokens, by where they were",
                        "timeseries",
                        "short",
                        [
                            (rate("vllm:prompt_tokens_cached_by_source_total", "source"), "{{source}}"),
                            (rate("vllm:prompt_tokens_by_source_total", "source", ', source="local_compute"'), "computed"),
                        ],
                    ),
                    (
                        "Tokens computed, by why they were not found",
                        "timeseries",
                        "short",
                        [(rate("quire:prefix_miss_tokens_total", "reason"), "{{reason}}")],
                    ),
                    (
                        "Prompts not found whole, by why",
                        "timeseries",
                        "short",
                        [(rate("quire:prefix_miss_total", "reason"), "{{reason}}")],
                    ),
                    ("Blocks that requests share", "timeseries", "short", [(gauge("quire:kv_blocks_shared"), "{{instance}}")]),
                ],
            ),
            (
                "Tiers",
                [
                    (
                        "Filled",
                        "timeseries",
                        "percentunit",
                        [
                            (
                                f"{gauge('quire:kv_tier_bytes', 'tier')} / {gauge('quire:kv_tier_capacity_bytes', 'tier')}",
                                "{{tier}}",
                            )
                        ],
                    ),
                    ("Blocks saved/s", "timeseries", "short", [(rate("quire:kv_tier_saved_blocks_total", "tier"), "{{tier}}")]),
                    ("Blocks loaded/s", "timeseries", "short", [(rate("quire:kv_tier_loaded_blocks_total", "tier"), "{{tier}}")]),
                    (
                        "Bytes/s",
                        "timeseries",
                        "Bps",
                        [
                            (rate("quire:kv_tier_read_bytes_total", "tier"), "{{tier}} read"),
                            (rate("quire:kv_tier_written_bytes_total", "tier"), "{{tier}} written"),
                        ],
                    ),
                    (
                        "Blocks lost/s",
                        "timeseries",
                        "short",
                        [
                            (rate("quire:kv_tier_evicted_blocks_total", "tier"), "{{tier}} evicted"),
                            (rate("quire:kv_tier_dropped_blocks_total", "tier"), "{{tier}} dropped"),
                            (rate("quire:kv_tier_damaged_blocks_total", "tier"), "{{tier}} damaged"),
                        ],
                    ),
                ],
            ),
            (
                "Prefill and decode apart",
                [
                    (
                        "Prompts, by who computed them and why",
                        "timeseries",
                        "reqps",
                        [(f"sum by (way, reason) (rate(quire:pd_requests_total{{{PROXY}}}[$__rate_interval]))", "{{way}} {{reason}}")],
                    ),
                    ("Prefill instances' answers", "timeseries", "s", quantiles("quire:pd_prefill_seconds", PROXY)),
                    ("Instances up", "timeseries", "short", [(f"min by (role, url) (quire:pd_upstream_up{{{PROXY}}})", "{{role}} {{url}}")]),
                    ("Load in tokens", "timeseries", "short", [(f"sum by (role, url) (quire:pd_upstream_load_tokens{{{PROXY}}})", "{{role}} {{url}}")]),
                    (
                        "Second tries and broken streams/s",
                        "timeseries",
                        "short",
                        [
                            (f"sum (rate(quire:pd_retries_total{{{PROXY}}}[$__rate_interval]))", "second try"),
                            (f"sum (rate(quire:pd_broken_streams_total{{{PROXY}}}[$__rate_interval]))", "broken stream"),
                        ],
                    ),
                ],
            ),
        ],
    ),
}  # fmt: skip


def dashboard(name: str) -> str:
    title, rows = DASHBOARDS[name]
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}
    ]
    for label, metric in (("model_name", "vllm:num_requests_running"), ("instance", "up")):
        query = f'label_values({metric}{{job="quire"}}, {label})'
        variables.append(
            {
                "name": label, "type": "query", "datasource": source, "refresh": 2,
                "query": {"query": query, "refId": label}, "definition": query,
                "multi": True, "includeAll": True, "allValue": ".*",
                "current": {"text": "All", "value": "$__all"},
            }
        )  # fmt: skip
    board = {
        "uid": name, "title": title, "tags": ["quire"], "schemaVersion": 39, "version": 1,
        "editable": True, "refresh": "30s", "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables}, "panels": list(_panels(rows, source)),
    }  # fmt: skip
    return json.dumps(board, indent=1) + "\n"


def _panels(
    rows: list[tuple[str, list[Panel]]], source: dict[str, str]
) -> Iterator[dict[str, Any]]:
    top = number = 0
    for title, panels in rows:
        number += 1
        yield {
            "id": number, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
        }  # fmt: skip
        width, height = (4, 4) if panels[0][1] == "stat" else (8, 8)
        for index, (name, kind, unit, queries) in enumerate(panels):
            number += 1
            column, row = index % (24 // width), index // (24 // width)
            yield {
                "id": number, "type": kind, "title": name, "datasource": source,
                "gridPos": {"x": column * width, "y": top + 1 + row * height, "w": width, "h": height},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {
                        "refId": "ABCDEFGH"[place], "datasource": source, "expr": expr,
                        "legendFormat": legend or name,
                    }
                    for place, (expr, legend) in enumerate(queries)
                ],
            }  # fmt: skip
        top += 1 + height * -(-len(panels) // (24 // width))


def files() -> dict[Path, str]:
    boards = {CHART / f"files/dashboards/{name}.json": dashboard(name) for name in DASHBOARDS}
    return {CHART / "values.schema.json": values_schema(), **boards}
