"""Write docs/options.md, docs/bench-options.md, docs/simulate-options.md, docs/api.md, docs/compat.md,
docs/json-schema.md, docs/metrics.md and some files of deploy/helm from the code, so that they cannot disagree
with the program.

python scripts/gen_docs.py            write
python scripts/gen_docs.py --check    exit 1 if what is on disk is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

import api_page
import compat_page
import deploy_files
import json_schema_page
import metrics_page

from quire.bench.options import bench_options
from quire.config import engine_options, server_options
from quire.config.options import OptionInfo
from quire.plan.options import simulate_options

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"
BENCH_PAGE = ROOT / "docs" / "bench-options.md"
SIMULATE_PAGE = ROOT / "docs" / "simulate-options.md"
API_PAGE = ROOT / "docs" / "api.md"
COMPAT_PAGE = ROOT / "docs" / "compat.md"
JSON_SCHEMA_PAGE = ROOT / "docs" / "json-schema.md"
METRICS_PAGE = ROOT / "docs" / "metrics.md"

TITLES = {
    "model": "Model",
    "cache": "KV cache",
    "scheduler": "Scheduler",
    "runtime": "Runtime",
    "structured": "Structured outputs",
    "speculative": "Speculative decoding",
    "lora": "LoRA adapters",
    "parallel": "Several devices",
    "recovery": "An engine core that dies",
    "kv_tiers": "KV in host memory and on disk",
    "kv_transfer": "Prefill/decode disaggregation",
    "kv_events": "KV events",
    "server": "Server",
}

# vLLM 0.32's default where ours differs, or "no such flag". Names absent here agree.
VLLM = {
    "model": "no built-in model",
    "load_format": "also formats we do not read",
    "gpu_memory_utilization": "0.92",
    "watermark": "0.0",
    "max_num_seqs": "256 or 1024 by GPU memory; 128 on a CPU",
    "max_num_batched_tokens": "by GPU, 2048 to 16384; 2048 on a CPU, 4096 in `LLM`",
    "max_num_queued_reqs": "none; beyond a limit 503, ours 429",
    "max_num_queued_tokens": "none; beyond a limit 503, ours 429",
    "itl_target": "no such flag",
    "cost_model": "no such flag",
    "max_ttft": "no such flag",
    "decision_record_bytes": "no such flag",
    "decision_record_dir": "no such flag",
    "retained_cache_share": "no such flag",
    "scheduling_policy": "`fcfs`; no `fair`",
    "priority_aging": "no such flag",
    "pipeline_layer_partition": "`VLLM_PP_LAYER_PARTITION`",
    "node_key_file": "no such flag",
    "max_core_deaths": "no such flag: the first death ends the server",
    "core_death_window": "no such flag",
    "core_hang_timeout": "`VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`",
    "poison_refusal_seconds": "no such flag",
    "worker_timeout": "no such flag",
    "swap_space": "no such flag any more",
    "kv_disk_path": "no such flag",
    "kv_disk_size": "no such flag",
    "kv_write_policy": "no such flag",
    "kv_load_failure_policy": "a key of its `kv_transfer_config`, `fail`",
    "api_key": "all keys share one cache",
    "api_keys_file": "no such flag",
    "admin_host": "no such flag",
    "admin_port": "no such flag",
    "admin_uds": "no such flag",
    "admin_api_key": "no such flag",
    "admin_metrics": "no such flag",
    "disable_playground": "no such flag",
    "cpu_activation_bits": "no such flag",
    "kernels": "no such flag",
    "cpu_threads": "no such flag",
    "log_format": "no such flag",
    "request_log": "no such flag",
    "slow_request_ttft": "no such flag",
    "slow_request_itl": "no such flag",
    "slow_request_seconds": "no such flag",
    "otlp_traces_endpoint": "also gRPC, its default; needs OpenTelemetry's packages",
    "trace_sample_ratio": "`OTEL_TRACES_SAMPLER`",
    "use_client_timeouts": "no such flag, no deadlines",
    "max_grammar_bytes": "no such flag, no limit",
    "json_whitespace": "`any`; its `disable_any_whitespace` is `none`",
    "lora_modules": "no such keyword of `LLM`",
    "lora_dir": "`VLLM_LORA_RESOLVER_CACHE_DIR`; its load endpoint reads any directory",
    "max_loras": "1",
    "max_cpu_loras": "max_loras",
    "max_lora_rank": "16; 1, 8, 16, 32, 64, 128, 256, 320 or 512",
    "shutdown_timeout": "0",
    "sse_keep_alive_interval": "0",
    "drain_delay": "no such flag",
    "health_timeout": "no such flag",
    "max_body_bytes": "no such flag",
    "max_prompts_per_request": "`VLLM_MAX_COMPLETION_PROMPTS`, 1024",
    "max_sequences_per_request": "`VLLM_MAX_N_SEQUENCES`, 16384, of n alone",
    "max_stop_strings": "`VLLM_MAX_STOP_STRINGS`, 4",
    "max_bad_words": "`VLLM_MAX_NUM_BAD_WORDS`, 128",
    "max_list_items": "no such flag",
    "strict_requests": "no such flag; unknown fields are ignored in silence",
    "tool_call_parser": "none",
    "reasoning_parser": "none",
    "enable_auto_tool_choice": "off",
    "enable_admin_endpoints": "`VLLM_SERVER_DEV_MODE=1`",
    "log_stats_interval": "`VLLM_LOG_STATS_INTERVAL`, 10",
}

HEADER = """\
# Options

Written by `scripts/gen_docs.py` from `src/quire/config/`; do not edit.

Every option is a flag of `quire serve`, a key of the YAML file given with `--config`, and, except for those
under *Server*, a keyword of `LLM(...)` and `EngineConfig`. Flags are spelled with dashes or underscores;
a flag on the command line wins over the file. On/off options are `--name` and `--no-name`. Sizes
take a suffix: `k`, `m`, `g` are powers of 1000, `K`, `M`, `G` of 1024. An option that is not listed here
is an error, not ignored. The last column says what vLLM 0.32 does where it is not the same.
"""


BENCH_HEADER = """\
# Options of quire bench

Written by `scripts/gen_docs.py` from `src/quire/bench/options.py`; do not edit.

`quire bench serve` takes all of these, `sweep` all but what it sets itself, `throughput` those under
*dataset* beside the [engine's options](options.md). Names and defaults are vLLM's where it has the flag.
"""


SIMULATE_HEADER = """\
# Options of quire simulate

Written by `scripts/gen_docs.py` from `src/quire/plan/options.py`; do not edit.

`quire simulate` takes these, `--model`, and the [engine's options](options.md), with the meaning that they
have for `quire serve`. TIME is a number with a unit: `500ms`, `30s`, `10m`, `2h`, `1d`. See
[simulate.md](simulate.md).
"""


def render_command(header: str, options: list[OptionInfo]) -> str:
    """The page of a command's options."""
    sections = [header]
    groups: dict[str, list[OptionInfo]] = {}
    for info in options:
        groups.setdefault(info.group, []).append(info)
    for group, infos in groups.items():
        rows = []
        for info in infos:
            flag, default, _, text, _ = _row(info)
            rows.append(f"| {flag} | {default} | {text} |")
        head = ["| Flag | Default | Meaning |", "|---|---|---|"]
        sections.append("\n".join([f"## {group.capitalize()}", "", *head, *rows, ""]))
    return "\n".join(sections)


def render() -> str:
    """The whole page."""
    sections = [HEADER]
    groups: dict[str, list[OptionInfo]] = {}
    for info in [*engine_options(), *server_options()]:
        groups.setdefault(info.group, []).append(info)
    for group, infos in groups.items():
        rows = [f"| {' | '.join(_row(info))} |" for info in infos]
        head = ["| Flag | Default | YAML key | Meaning | vLLM 0.32 |", "|---|---|---|---|---|"]
        sections.append("\n".join([f"## {TITLES[group]}", "", *head, *rows, ""]))
    return "\n".join(sections)


def _row(info: OptionInfo) -> list[str]:
    flags = [f"`{flag}`" for flag in (info.flag, *info.aliases)]
    if info.is_bool:
        flags.append(f"`--no-{info.flag[2:]}`")
    if info.positional:
        flags.insert(0, f"`{info.name.upper()}`")
    text = info.help
    if info.choices:
        text += f" One of {', '.join(f'`{choice}`' for choice in info.choices)}."
    cells = [
        ", ".join(flags),
        _default(info.default),
        f"`{info.name}`",
        text,
        VLLM.get(info.name, ""),
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def _default(value: object) -> str:
    if value is None or value in ((), "", {}):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(f"`{part}`" for part in value)
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value // 2**20}M"
    return (
        f"`{value}`"
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def main() -> int:
    unknown = set(VLLM) - {info.name for info in [*engine_options(), *server_options()]}
    if unknown:
        print(
            f"scripts/gen_docs.py: VLLM names options that do not exist: {', '.join(sorted(unknown))}"
        )
        return 1
    status = 0
    for problem in api_page.problems():
        print(problem)
        status = 1
    pages = (
        (PAGE, render()),
        (BENCH_PAGE, render_command(BENCH_HEADER, bench_options())),
        (SIMULATE_PAGE, render_command(SIMULATE_HEADER, simulate_options())),
        (API_PAGE, api_page.render()),
        (COMPAT_PAGE, compat_page.render()),
        (JSON_SCHEMA_PAGE, json_schema_page.render()),
        (METRICS_PAGE, metrics_page.render()),
        *deploy_files.files().items(),
    )
    for page, text in pages:
        if "--check" not in sys.argv:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
        elif not page.exists() or page.read_text(encoding="utf-8") != text:
            print(f"{page.relative_to(ROOT)} is not up to date: run `make docs`")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
