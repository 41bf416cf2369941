"""Every query in alerts, dashboards, the autoscaler and docs/metrics.md parses, asks for metrics and labels
that exist, and has data when a prefill pod, a decode pod and their proxy are under load."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.deploy.kube import CHART, ROOT, of_kind, pods, render, rendered, tools
from tests.deploy.pod import Pod
from tests.free_ports import free_port

from quire.server.keys import entry_for
from quire.server.pd_proxy import PDProxy, ProxyOptions

ALERTS = CHART / "files/alerts.yaml"
TARGET = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus adds."""
VARIABLES = {"$__rate_interval": "1m", "$model_name": ".*", "$instance": ".*"}
COMPARISONS = ("==", "!=", ">", "<", ">=", "<=", "and", "or", "unless")


def queries() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for path in sorted((CHART / "files/dashboards").iterdir()):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield f"{board['title']}: {panel['title']} {target['refId']}", target["expr"]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
                yield (
                    f"{board['title']}: ${variable['name']}",
                    f"count by ({asked[2]}) ({asked[1]})",
                )
    values = {"autoscaling": {"enabled": True}}
    for each in of_kind(render(values), "ScaledObject"):
        for number, trigger in enumerate(each["spec"]["triggers"]):
            yield f"KEDA {number}", trigger["metadata"]["query"]
    for number, text in enumerate(
        re.findall(r"`([^`]*rate\([^`]*)`", (ROOT / "docs/metrics.md").read_text())
    ):
        yield f"docs/metrics.md {number}", text


def parsed(text: str) -> Any:
    tools()
    import promql_parser

    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    return promql_parser.parse(text)


def nodes(expr: Any) -> list[Any]:
    import promql_parser

    found: list[Any] = []
    promql_parser.walk(expr, found.append)
    return found


def exposed() -> dict[str, dict[str, set[str]]]:
    """Sample name -> label -> values, of a server, a proxy and their processes."""
    spec = importlib.util.spec_from_file_location("metrics_page", ROOT / "scripts/metrics_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    proxy = PDProxy(ProxyOptions(("http://p:1",), ("http://d:1",)))
    proxy.count("prefill", "")
    families = [*page.registry().collect(), *proxy._registry.collect()]
    found: dict[str, dict[str, set[str]]] = {"up": {}}
    for sample in (sample for family in families for sample in family.samples):
        labels = found.setdefault(sample.name, {})
        for label, value in sample.labels.items():
            labels.setdefault(label, set()).add(value)
    return found


LISTED = ("source", "tier", "finished_reason", "role")
"""Labels whose values are a fixed list; also reason, where it is not the proxy's."""


def faults(text: str, known: dict[str, dict[str, set[str]]]) -> list[str]:
    try:
        expr = parsed(text)
    except ValueError as error:
        return [str(error)]
    found, present = [], set(TARGET)
    for node in nodes(expr):
        selector = getattr(node, "vector_selector", node)
        if type(selector).__name__ != "VectorSelector":
            continue
        if selector.name not in known:
            found.append(f"no metric {selector.name}")
            continue
        labels = known[selector.name]
        present |= set(labels)
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels.keys() | TARGET:
                found.append(f"{selector.name} has no label {matcher.name}")
            elif matcher.name in LISTED:
                asked = matcher.value.split("|")  # all that is used of regular expressions
                found += [
                    f"{matcher.name} is never {value}"
                    for value in asked
                    if value not in labels[matcher.name]
                ]
            elif matcher.name == "status" and not re.fullmatch("[1-5]xx", matcher.value):
                found.append(f"status is never {matcher.value}")
    for node in nodes(expr):
        modifier = getattr(node, "modifier", None)
        if type(node).__name__ == "AggregateExpr" and modifier is not None:
            found += [
                f"no label {each} to group by" for each in modifier.labels if each not in present
            ]
    return found


def test_metrics_and_labels_exist() -> None:
    known = exposed()
    asked = dict(queries())
    assert len(asked) > 70
    assert {name: wrong for name, text in asked.items() if (wrong := faults(text, known))} == {}


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("sum(vllm:num_requests_waiting", "parenthesis"),
        ("sum(vllm:num_request_waiting)", "no metric vllm:num_request_waiting"),
        (
            'sum(vllm:num_requests_waiting{model="m"})',
            "vllm:num_requests_waiting has no label model",
        ),
        (
            "sum by (modelname) (rate(vllm:generation_tokens_total[1m]))",
            "no label modelname to group by",
        ),
        (
            'rate(vllm:request_success_total{finished_reason="ok"}[1m])',
            "finished_reason is never ok",
        ),
        ('http_requests_total{status="500"}', "status is never 500"),
    ],
)
def test_wrong_queries_are_noticed(query: str, fault: str) -> None:
    assert fault in str(faults(query, exposed()))


def parts(expr: Any) -> Iterator[str]:
    """The queries that an expression compares, of which each must have data."""
    kind = type(expr).__name__
    if kind == "ParenExpr":
        yield from parts(expr.expr)
    elif kind == "BinaryExpr" and str(expr.op).lower() in COMPARISONS:
        yield from parts(expr.lhs)
        yield from parts(expr.rhs)
    elif kind == "Call" and expr.func.name == "absent":
        yield from parts(expr.args[0])
    elif kind != "NumberLiteral":
        yield expr.prettify()


KEY = "sk-of-the-only-tenant"
PROMPT = "Once upon a time there was a lighthouse keeper who counted ships. " * 40


@pytest.mark.timeout(400)
async def test_each_query_has_data_under_load(folder: Path, kernels: Path) -> None:
    small = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
    kv_port = free_port()
    keys = entry_for(KEY, tenant="t")
    secrets = {"kv": {"key": "k" * 32}, "keys": {"keys.toml": keys}}
    values = {
        "shutdown": {"preStopSeconds": 1, "drainDelaySeconds": 1, "timeoutSeconds": 20},
        "apiKeysFile": {"existingSecret": "keys"},
        "kvDisk": {"enabled": True, "size": 1},
        "config": {"swap_space": 0.2, "kv_write_policy": "write_through"},
        "disaggregation": {
            "enabled": True,
            "kvKey": {"existingSecret": "kv"},
            "podNetwork": "127.0.0.0/8",
            "kvPort": kv_port,
            "prefill": {"resources": small},
            "decode": {
                "resources": small,
                # The load repeats a prompt, so there are always drafts that pay.
                "config": {"data_parallel_size": 2, "spec_method": "suffix"},
            },
        },
    }
    manifests = render(values)
    specs = dict(pods(manifests))
    running: list[Pod] = []
    prometheus = None
    try:
        for name in ("llm-quire-prefill", "llm-quire-decode"):
            pod = Pod(manifests, specs[name], folder, secrets=secrets, volumes={"cache": kernels})
            running.append(pod)
        early = asyncio.create_task(ask_before_it_is_loaded(running[1]))
        await asyncio.gather(*(pod.ready() for pod in running))
        assert await early == 503
        addresses = {
            f"http://llm-quire-{role}-0.llm-quire-{role}:8000": pod.url
            for role, pod in zip(("prefill", "decode"), running, strict=True)
        }
        proxy = Pod(manifests, specs["llm-quire-proxy"], folder, replace=addresses)
        running.append(proxy)
        await proxy.ready()
        url = f"http://127.0.0.1:{free_port()}"
        prometheus = start_prometheus(folder, url, running)
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=proxy.url, timeout=60, headers=headers) as client:
            deadline = time.monotonic() + 120
            missing = wanted = {
                (name, part) for name, text in queries() for part in parts(parsed(text))
            }
            number = 0
            while missing and time.monotonic() < deadline:
                for _ in range(8):
                    number += 1
                    await asyncio.gather(ask(client, number), ask(client, 1))
                missing = {each for each in missing if not await has_data(url, each[1])}
                print(f"{len(missing)} of {len(wanted)} queries have no data yet")
        assert missing == set(), f"{len(missing)} of {len(wanted)} have no data"
        await asyncio.gather(*(pod.terminate() for pod in running))
    finally:
        for pod in running:
            pod.kill()
        if prometheus is not None:
            prometheus.terminate()
            prometheus.wait(20)


async def ask(client: httpx.AsyncClient, number: int) -> None:
    body = {"prompt": f"{number}. {PROMPT}", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


async def ask_before_it_is_loaded(pod: Pod) -> int:
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=pod.url, headers=headers) as client:
        while True:
            try:
                return (await client.post("/v1/completions", json={"prompt": "a"})).status_code
            except httpx.TransportError:
                await asyncio.sleep(0.02)


def start_prometheus(folder: Path, url: str, running: list[Pod]) -> subprocess.Popen[bytes]:
    targets = [
        {
            "targets": [pod.url.removeprefix("http://")],
            "labels": {"namespace": "serving", "pod": f"p{i}"},
        }
        for i, pod in enumerate(running)
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "5s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "quire", "static_configs": targets}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [
            tools() / "bin/prometheus",
            f"--config.file={folder}/prometheus.yaml",
            f"--storage.tsdb.path={folder}/metrics",
            f"--web.listen-address={url.removeprefix('http://')}",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


async def has_data(url: str, query: str) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        try:
            answer = await client.get("/api/v1/query", params={"query": query})
        except httpx.TransportError:  # it is starting
            return False
    if answer.status_code == 503:
        return False
    assert answer.status_code == 200, (query, answer.text)
    result = answer.json()["data"]["result"]
    return any(math.isfinite(float(each["value"][1])) for each in result)


def test_the_label_that_others_get_wrong() -> None:
    """vLLM's own chart asks for `model`, which no metric has, so it never scales."""
    (scaled,) = of_kind(rendered("monitored"), "ScaledObject")
    for trigger in scaled["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        assert 'model_name="a \\"model\\""' in query and 'namespace="serving"' in query
        assert faults(query, exposed()) == []
