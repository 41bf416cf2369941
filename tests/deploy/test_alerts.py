"""Each alert fires on what it is for and stays silent on what is usual; each is in the runbook."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tests.deploy.kube import CHART, ROOT, run

FILE = CHART / "files/alerts.yaml"
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load(FILE.read_text())["groups"]
    for rule in group["rules"]
}

ONE = 'job="quire", instance="a:8000", namespace="n", pod="a"'
MODEL = f'{ONE}, model_name="m", engine="0"'
HTTP = f'{ONE}, handler="/v1/completions", method="POST"'
Case = tuple[dict[str, str], dict[str, str]]


def series(text: str, **metrics: str) -> dict[str, str]:
    """Prometheus' notation: `START+STEPxTIMES`, a sample a minute."""
    return {f"{name}{{{text}}}": values for name, values in metrics.items()}


def latency(metric: str, slow: int, quick: int) -> dict[str, str]:
    """A histogram of seconds: `quick` a minute up to 0.1, `slow` more up to 40."""
    return {
        f'{metric}_bucket{{{MODEL}, le="0.1"}}': f"0+{quick}x60",
        f'{metric}_bucket{{{MODEL}, le="40"}}': f"0+{quick + slow}x60",
        f'{metric}_bucket{{{MODEL}, le="+Inf"}}': f"0+{quick + slow}x60",
    }


def answers(good: int, bad: int) -> dict[str, str]:
    return {
        f'http_requests_total{{{HTTP}, status="2xx"}}': f"0+{good}x60",
        f'http_requests_total{{{HTTP}, status="5xx"}}': f"0+{bad}x60",
        # A probe that is answered 503 is none of a client's.
        f'http_requests_total{{{ONE}, handler="/ready", method="GET", status="5xx"}}': "0+600x60",
    }


def step(running: str, generated: str, prompt: str) -> dict[str, str]:
    return {
        f"vllm:num_requests_running{{{MODEL}}}": running,
        f"vllm:generation_tokens_total{{{MODEL}}}": generated,
        f"vllm:prompt_tokens_total{{{MODEL}}}": prompt,
    }


def ends(**reasons: int) -> dict[str, str]:
    return {
        f'vllm:request_success_total{{{MODEL}, finished_reason="{reason}"}}': f"0+{count}x60"
        for reason, count in reasons.items()
    }


TIER = f'{MODEL}, tier="disk"'
PEER = f'{ONE}, role="prefill", url="http://p:8000"'
OTHER_PROXY = (
    'job="quire", instance="b:8000", namespace="n", pod="b", role="prefill", url="http://p:8000"'
)
CASES: dict[str, Case] = {
    "QuireDown": ({f"up{{{ONE}}}": "1x20 0x40"}, {f"up{{{ONE}}}": "1x50 0 1x9"}),
    "QuireAbsent": ({'up{job="other"}': "1x60"}, {f"up{{{ONE}}}": "0x60"}),
    "QuireReplicaDown": (
        {
            f"quire:replica_up{{{MODEL}}}": "1x20 0x40",
            f'quire:replica_up{{{ONE}, engine="1"}}': "1x60",
        },
        {f"quire:replica_up{{{MODEL}}}": "1x60"},
    ),
    "QuireStalled": (
        step("3x60", "0+600x30 18000x30", "0+60x30 1800x30"),
        step("0x60", "0x60", "0x60") | {"x": "1"},
    ),
    "QuireRestarts": (
        {f"process_start_time_seconds{{{ONE}}}": "1x40 2 3 4x18"},
        {f"process_start_time_seconds{{{ONE}}}": "1x40 2x20"},
    ),
    "QuireCoreRestarts": (
        series(ONE, **{"quire:core_restarts_total": "0x40 1x20"}),
        series(ONE, **{"quire:core_restarts_total": "3x60"}),
    ),
    "QuirePoisonRequest": (
        series(ONE, **{"quire:poison_requests_total": "0x40 1x20"}),
        series(ONE, **{"quire:poison_requests_total": "1x60"}),
    ),
    "QuireErrors": (answers(60, 6), answers(600, 1)),
    "QuireRequestsFailed": (
        {f'vllm:request_success_total{{{MODEL}, finished_reason="error"}}': "0x55 1x5"},
        {
            f'vllm:request_success_total{{{MODEL}, finished_reason="error"}}': "5x60",
            f'vllm:request_success_total{{{MODEL}, finished_reason="abort"}}': "0+60x60",
        },
    ),
    "QuireKeysFile": (
        series(ONE, **{"quire:api_keys_file_current": "1x30 0x30"}),
        series(ONE, **{"quire:api_keys_file_current": "1x57 0x3"}),
    ),
    "QuireTracesLost": (
        {f'quire:trace_spans_dropped_total{{{ONE}, reason="unreachable"}}': "0+4x60"},
        {f'quire:trace_spans_dropped_total{{{ONE}, reason="full"}}': "0x30 9x30"},
    ),
    "QuireDescriptors": (
        series(ONE, process_open_fds="900x60", process_max_fds="1024x60"),
        series(ONE, process_open_fds="700x60", process_max_fds="1024x60"),
    ),
    "QuireRejecting": (
        {f'vllm:admission_rejections_total{{{MODEL}, reason="max_num_queued_reqs"}}': "0+20x60"},
        {f'vllm:admission_rejections_total{{{MODEL}, reason="max_num_queued_reqs"}}': "0+1x60"},
    ),
    "QuireDeadlines": (ends(stop=90, timeout=4, expired=4), ends(stop=90, timeout=2, expired=2)),
    "QuireQueueLong": (
        {f"vllm:num_requests_waiting{{{MODEL}}}": "0x20 30x40"},
        {f"vllm:num_requests_waiting{{{MODEL}}}": "0x52 30x8"},
    ),
    "QuireFirstTokenSlow": (
        latency("vllm:time_to_first_token_seconds", 10, 50),
        latency("vllm:time_to_first_token_seconds", 1, 50),
    ),
    "QuireTokensSlow": (
        latency("vllm:inter_token_latency_seconds", 10, 50),
        latency("vllm:inter_token_latency_seconds", 1, 50),
    ),
    "QuireCacheFull": (
        {f"vllm:kv_cache_usage_perc{{{MODEL}}}": "0.5x20 0.99x40"},
        {f"vllm:kv_cache_usage_perc{{{MODEL}}}": "0.8x50 0.99x10"},
    ),
    "QuirePreempting": (
        {f"vllm:num_preemptions_total{{{MODEL}}}": "0+30x60"},
        {f"vllm:num_preemptions_total{{{MODEL}}}": "0+2x60"},
    ),
    "QuireTierOff": (
        {f"quire:kv_tier_off{{{TIER}}}": "0x59 1"},
        {f"quire:kv_tier_off{{{TIER}}}": "0x60"},
    ),
    "QuireTierDamaged": (
        {f"quire:kv_tier_damaged_blocks_total{{{TIER}}}": "0x30 2x30"},
        {f"quire:kv_tier_damaged_blocks_total{{{TIER}}}": "2x60"},
    ),
    "QuirePeerDown": (
        {
            f"quire:pd_upstream_up{{{PEER}}}": "1x20 0x40",
            f"quire:pd_upstream_up{{{OTHER_PROXY}}}": "0x60",
        },
        {
            f"quire:pd_upstream_up{{{PEER}}}": "0x60",
            f"quire:pd_upstream_up{{{OTHER_PROXY}}}": "1x60",
        },
    ),
    "QuireStreamsBroken": (
        {f"quire:pd_broken_streams_total{{{ONE}}}": "0x50 1x10"},
        {f"quire:pd_broken_streams_total{{{ONE}}}": "1x60"},
    ),
}


def test_each_alert_has_its_cases() -> None:
    assert set(CASES) == set(ALERTS)


def promtool(folder: Path, cases: dict[str, Case], *, fails: bool = False) -> str:
    tests = []
    for alert, both in cases.items():
        for fires, inputs in zip((True, False), both, strict=True):
            expected = [{"labels": "{}", "value": 1}] if fires else []
            query = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
            tests.append(
                {
                    "name": f"{alert} {'fires' if fires else 'is silent'}",
                    "interval": "1m",
                    "input_series": [
                        {"series": name, "values": each} for name, each in inputs.items()
                    ],
                    "promql_expr_test": [
                        {"expr": query, "eval_time": "60m", "exp_samples": expected}
                    ],
                }
            )
    path = folder / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(FILE)], "tests": tests}))
    return run("promtool", "test", "rules", path, fails=fails)


def test_each_alert_fires_and_stays_silent(tmp_path: Path) -> None:
    assert "SUCCESS" in promtool(tmp_path, CASES)


def test_a_wrong_case_is_noticed(tmp_path: Path) -> None:
    swapped = {"QuireTierOff": CASES["QuireTierOff"][::-1]}
    out = promtool(tmp_path, swapped, fails=True)
    assert "QuireTierOff" in out and out.count("expr:") == 2


def test_promtool_finds_nothing_wrong() -> None:
    assert f"{len(ALERTS)} rules found" in run(
        "promtool", "check", "rules", "--lint=all", "--lint-fatal", FILE
    )


@pytest.mark.parametrize("name", ALERTS)
def test_each_has_what_the_person_on_call_needs(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page, anchor = rule["annotations"]["runbook_url"].split("#")
    assert anchor == name.lower()
    sections = re.split(r"^### ", (ROOT / page).read_text(), flags=re.M)
    (section,) = (each for each in sections if each.startswith(f"{name}\n"))
    assert len(section.split()) > 20, "a section that says nothing"
    threshold = re.search(r"[<>=] ([0-9.]+)$", rule["expr"])
    assert threshold or name == "QuireAbsent", "the chart changes the last number"
