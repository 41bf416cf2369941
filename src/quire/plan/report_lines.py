"""A simulation's figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.plan.figures import PERCENTILES

LATENCIES = {
    "ttft_ms": "TTFT", "itl_ms": "ITL", "tpot_ms": "TPOT", "e2e_ms": "end to end", "queue_ms": "queue",
}  # fmt: skip
TIME_IS = {
    "fitted": "as fitted to measured steps",
    "estimate": "an estimate from the data sheet, by what others have measured",
    "bound": "a bound from the data sheet: no real device is faster",
}


def report_lines(content: Mapping[str, Any]) -> list[str]:
    """Of one run."""
    lines = head(content["about"])
    name = "milliseconds"
    lines.append(f"{name:<14}{'mean':>11}" + "".join(f"{f'p{each}':>11}" for each in PERCENTILES))
    for key, title in LATENCIES.items():
        row = content[key]
        lines.append(f"{title:<14}" + "".join(f"{_short(value):>11}" for value in row.values()))
    lines += [
        "",
        f"{content['requests']:,} requests in {content['seconds']:,.0f} s: "
        f"{content['requests_per_second']:.4g} a second, {content['output_tokens_per_second']:,.0f} "
        f"output tokens/s, {content['tokens_per_second']:,.0f} tokens/s in all",
        f"found in the cache {content['cache_hit_rate']:.1%} of prompt tokens; preemptions "
        f"{content['preemptions']:,}; replicas busy {content['busy']:.1%}; KV blocks used "
        f"{content['kv_usage']:.1%}, at most {content['kv_usage_peak']:.1%}",
    ]
    if "goodput" in content:
        lines.append(
            f"within the SLO: {content['meet_slo']:.1%}, {content['goodput']:.4g} requests a second"
        )
    if "cost" in content:
        cost = content["cost"]
        lines.append(
            f"${cost['per_million_output_tokens']:.3f} per million output tokens, "
            f"${cost['per_million_tokens']:.3f} per million tokens; {content['replicas']:.4g} replicas in "
            "the mean"
        )
    sample = content.get("sample")
    if sample is not None:
        lines.append(_sample(content, sample))
    lines.append(f"{content['steps']:,} steps, of which {content['jumped_steps']:,} were jumped")
    return lines


def _sample(content: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    text = f"a sample: {sample['replicas']} of the replicas"
    if "windows" not in sample:
        return text
    errors = ", ".join(
        f"{name.replace('_ms.', ' ').upper().replace('P99', 'p99').replace('MEAN', 'mean')} {value:.1%}"
        for name, value in sample["standard_error"].items()
    )
    late = sample["overloaded_windows"]
    warning = (
        f"; in {late} of them requests pile up, and longer ones would be slower" if late else ""
    )
    return f"{text}, {sample['windows']} windows{warning}. Standard errors: {errors}"


def sweep_lines(content: Mapping[str, Any]) -> list[str]:
    """Of several rates."""
    head_row = (
        "rate", "served", "out tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "E2E p99", "busy",
    )  # fmt: skip
    lines = [*head(content["about"]), "".join(f"{name:>11}" for name in head_row)]
    for point in content["points"]:
        values = (
            point["rate"], point["steady"]["served"], point["output_tokens_per_second"],
            point["ttft_ms"]["p50"], point["ttft_ms"]["p99"], point["itl_ms"]["p50"],
            point["itl_ms"]["p99"], point["e2e_ms"]["p99"],
        )  # fmt: skip
        lines.append("".join(f"{_short(each):>11}" for each in values) + f"{point['busy']:>11.0%}")
    first = content["first_saturated_rate"]
    lines += [
        "",
        f"most that was served: {content['saturation_rate']:.4g} requests a second; "
        + ("no rate saturates it" if first is None else f"saturated at {first:g} a second"),
    ]
    return lines


def head(about: Mapping[str, Any]) -> list[str]:
    rate = "its own rate" if about["rate"] is None else f"{about['rate']:g} requests/s"
    return [
        f"{about['model']}, {about['trace']} at {rate}, {replicas_of(about)}"
        + (f" of {about['gpu']}" if about["gpu"] else "")
        + f", routing {about['routing']}, seed {about['seed']}",
        f"the time of a step is {TIME_IS[about['step_time']]}; {about['kv_blocks']:,} blocks of "
        f"{about['block_size']}, at most {about['max_num_seqs']} requests at once in steps of "
        f"{about['max_num_batched_tokens']:,} tokens",
        "",
    ]


def replicas_of(about: Mapping[str, Any]) -> str:
    count = about["replicas"]
    return "1 replica" if count == 1 else f"{count} replicas"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
