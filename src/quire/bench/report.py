"""The table in vLLM's format, and the JSON with vLLM's keys."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from quire.bench.options import LoadOptions, ReportOptions
from quire.bench.record import run_record
from quire.bench.serve import ServeRun, Target
from quire.errors import ConfigError

WIDTH = 50
TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
CLIENT = {
    "client_lag": "Client lag",
    "ttft_from_due": "TTFT from due time",
    "e2el_from_due": "E2EL from due time",
}
LAG_WORTH_SAYING_MS = 5.0


def table(run: ServeRun, load: LoadOptions, report: ReportOptions) -> str:
    """The figures, for a terminal."""
    figures = run.figures
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    lines.append(_row("Successful requests:", figures["completed"]))
    lines.append(_row("Failed requests:", figures["failed"]))
    if load.max_concurrency is not None:
        lines.append(_row("Maximum request concurrency:", load.max_concurrency))
    if load.request_rate != math.inf:
        lines.append(_row("Request rate configured (RPS):", load.request_rate))
    rows = {
        "Benchmark duration (s):": "duration",
        "Total input tokens:": "total_input_tokens",
        "Total generated tokens:": "total_output_tokens",
        "Request throughput (req/s):": "request_throughput",
        "Request goodput (req/s):": "request_goodput",
        "Output token throughput (tok/s):": "output_throughput",
        "Peak output token throughput (tok/s):": "max_output_tokens_per_s",
        "Peak concurrent requests:": "max_concurrent_requests",
        "Total token throughput (tok/s):": "total_token_throughput",
        "Sessions:": "sessions",
        "Interactivity, 1 / P90 per token (tok/s):": "interactivity",
        "Acceptance rate (%):": "spec_decode_acceptance_rate",
        "Acceptance length:": "spec_decode_acceptance_length",
        "Drafts:": "spec_decode_num_drafts",
        "Draft tokens:": "spec_decode_draft_tokens",
        "Accepted tokens:": "spec_decode_accepted_tokens",
    }
    shown = {text: figures.get(key) for text, key in rows.items()}
    lines += [_row(text, value) for text, value in shown.items() if value is not None]
    for name in report.percentile_metrics.split(","):
        title, short = TITLES[name]
        lines.append(title.center(WIDTH, "-"))
        lines += _metric_rows(figures, name, short, report.percentiles)
    if _number(figures["mean_client_lag_ms"]) > LAG_WORTH_SAYING_MS:
        lines.append("From when requests were due".center(WIDTH, "-"))
        for name, short in CLIENT.items():
            lines += _metric_rows(figures, name, short, report.percentiles)
    lines.append("=" * WIDTH)
    errors = figures["error_counts"]
    if isinstance(errors, dict):
        lines += [f"failed: {count} x {text}" for text, count in errors.items()]
    return "\n".join(lines)


def _metric_rows(
    figures: dict[str, object], name: str, short: str, percentiles: Sequence[float]
) -> list[str]:
    words = {"mean": "Mean", "median": "Median"}
    words |= {f"p{percentile:g}": f"P{percentile:g}" for percentile in percentiles}
    return [
        _row(f"{word} {short} (ms):", figures[f"{key}_{name}_ms"]) for key, word in words.items()
    ]


def _row(text: str, value: object) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{text:<40} {shown:<10}".rstrip()


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def result_json(
    run: ServeRun, target: Target, load: LoadOptions, report: ReportOptions
) -> dict[str, object]:
    """vLLM's keys, then ours; with `save_detailed` one list entry per request. Times there are seconds."""
    result: dict[str, object] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": backend_name(target),
        "endpoint_type": backend_name(target),
        "label": report.label,
        "model_id": target.model,
        "tokenizer_id": target.tokenizer_id,
        "num_prompts": len(run.times),
        **dict(pair.split("=", 1) for pair in report.metadata),
        "request_rate": load.request_rate if load.request_rate != math.inf else "inf",
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
    }
    if load.ramp_up_strategy is not None:
        result["ramp_up_strategy"] = load.ramp_up_strategy
        result["ramp_up_start_rps"] = load.ramp_up_start_rps
        result["ramp_up_end_rps"] = load.ramp_up_end_rps
    result |= run.figures
    if report.save_detailed:
        result |= {
            "input_lens": [times.prompt_len for times in run.times],
            "cached_lens": [times.cached_len for times in run.times],
            "output_lens": [times.output_len for times in run.times],
            "ttfts": [times.ttft for times in run.times],
            "itls": [times.itl for times in run.times],
            "e2els": [times.e2el for times in run.times],
            "due_times": [times.due for times in run.times],
            "start_times": [times.sent for times in run.times],
            "generated_texts": run.texts,
            "errors": [times.error for times in run.times],
        }
    return result | {"record": run_record()}


def backend_name(target: Target) -> str:
    return target.options.backend or ("openai-chat" if target.options.chat else "openai")


def result_path(target: Target, load: LoadOptions, report: ReportOptions) -> Path:
    """The path of the JSON file; the default name is as in vLLM."""
    name = report.result_filename
    if name is None:
        rate = f"{load.request_rate:g}" if load.request_rate == math.inf else load.request_rate
        parts = [report.label or backend_name(target), f"{rate}qps"]
        if load.ramp_up_strategy is not None:
            parts[1] = (
                f"ramp-up-{load.ramp_up_strategy}-{load.ramp_up_start_rps:g}qps-"
                f"{load.ramp_up_end_rps:g}qps"
            )
        if load.max_concurrency is not None:
            parts[1] += f"-concurrency{load.max_concurrency}"
        parts += [Path(target.model).name, datetime.now().strftime("%Y%m%d-%H%M%S")]
        name = "-".join(parts) + ".json"
    return Path(report.result_dir or ".") / name


def write_json(path: Path, content: dict[str, object]) -> None:
    """Raises `ConfigError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from None
