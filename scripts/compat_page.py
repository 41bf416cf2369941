"""docs/compat.md: what vLLM 0.32 has and Quire has not, or has otherwise. The flags come from the table that
the command line uses; `tests/conformance/test_names.py` checks that no other name is missing here."""

# ruff: noqa: E501 - rows of tables are as long as they are

from __future__ import annotations

from quire.config.foreign import FOREIGN, Foreign
from quire.config.kv_transfer import NOT_HERE

HEAD = """\
# Coming from vLLM

Written by `scripts/gen_docs.py` from `src/quire/config/foreign.py` and `scripts/compat_page.py`; do not edit.

A script for vLLM 0.32's server, or for OpenAI's, should run by changing its URL, one for `vllm.LLM` by changing an
import. This page is the exceptions. Defaults that differ are in the last column of [options.md](options.md),
endpoints and request fields in that of [api.md](api.md), with what is refused at its end.

## Flags, and keywords of `LLM`

Every flag of `vllm serve` that is not in options.md or below is an error that suggests the nearest name. What
follows is accepted with the values in the second column, in silence. Any other value is an error where the
third column says *refused*, as ignoring it would change what is served; else it only causes a line in the log.
"""

REST = """\
## Commands

`serve`, `chat`, `complete`, `run-batch`, `bench` and `collect-env` are there; `bench mm-processor` is not.

## Sampling parameters

Names, defaults and rules are vLLM's. Absent, as they are about what Quire has not: `prompt_logprob_token_ids`,
`watermarking`, `routed_experts_prompt_start`, `trace_decode_token_ids`, `skip_clone`. Of `extra_args`,
`kv_transfer_params` has an effect. `max_tokens` 0 is accepted where only the prompt is scored. With `structured_outputs`, `min_tokens`
is ignored: a complete text ends.

## Outputs

Absent from `RequestOutput`: `encoder_prompt`, `encoder_prompt_token_ids`,
`num_cache_creation_tokens`, `prompt_token_id_logprobs`, `ec_transfer_params`; from
`CompletionOutput`: `routed_experts`, `lora_request`, `sampling_mask`, `weight_versions`; from
`metrics`: `is_corrupted` (such a request ends with finish_reason `error`), and the names of vLLM's V0. Added:
`RequestOutput.error`, which says what a finish_reason `error` was.

Absent from `LLM`: `classify`, `collective_rpc`, `apply_model`, `start_profile`, `stop_profile`.

## Metrics

Names, labels, buckets and counts are vLLM's, and `gpu_cache_usage_perc`, `time_per_output_token_seconds`,
`gpu_prefix_cache_queries` and `gpu_prefix_cache_hits`, which vLLM has removed and dashboards still read, are always
there. All are listed in [metrics.md](metrics.md). Absent, because there is nothing that they could count: `mm_cache_queries`, `mm_cache_hits`, `corrupted_requests`,
`estimated_flops_per_gpu`, `estimated_read_bytes_per_gpu`,
`estimated_write_bytes_per_gpu`, `kv_block_lifetime_seconds`, `kv_block_idle_before_evict_seconds`,
`kv_block_reuse_gap_seconds`. With `-dp` each replica has its `engine`. `/metrics` is always in the text format: OpenMetrics would rewrite the colon. Traces have vLLM's span `llm_request` and
its attributes, and below it `queue`, `prefill` and `decode`; of `--collect-detailed-traces` there is nothing.

## HTTP

| case | vLLM 0.32 | Quire | why |
|---|---|---|---|
| prompt and `max_tokens` exceed the context | clamps, 200 | 400 that names both numbers | a silently shortened answer |
| the queue is full | 503 | 429 with Retry-After | clients and balancers know what to do with it |
| an unknown field | ignored | `warnings` in the answer and a header; `--strict-requests`: 400 | a misspelt name changed nothing, silently |
| `guided_*` | ignored with one warning | 400 that names `structured_outputs` | text that should match a schema would not |
| white space in JSON that a schema asks for | any amount; `disable_any_whitespace` forbids it | bounded; `--json-whitespace any` or `none` | JSON could go on in blanks to `max_tokens` |
| a schema with `oneOf` whose branches overlap, `uniqueItems`, ... | depends on the backend; ignored, or 400 | 400 that names keyword and place, see [json-schema.md](json-schema.md) | an answer that breaks its schema |
| an unknown string `format` | depends on the backend | accepted, with a warning | it cannot be checked |
| unknown route or method | `{"detail"}` | `{"detail"}` and `error` | both are looked for |
| tools and items that need a provider's servers (`web_search`, `image_generation`, `bash_20250124`, ...) | left out | left out with a warning; 400 if `tool_choice` needs one | agents send them in every request |
| `custom` tools and `namespace`s of `/v1/responses` | left out, or returned as flat names | served as functions; a call has the client's own form; the format of a custom tool is not enforced | Codex edits files with the one, and finds MCP servers by the other |
| Claude Code's line `x-anthropic-billing-header: ...` in a system text | left out of `/v1/messages` | left out everywhere | gateways pass it on to the other endpoints; it changes at every request, so nothing after it would be cached |
| a media part | 422 or served | 400 | models read text |
| an adapter's file that cannot be served | 500 | 400 that says why | the file is wrong, not the server |
| an adapter reloaded in place | finds KV of its old content | does not: the prefix cache knows the content | answers of two versions would be mixed |
| requests of more adapters than `max_loras` | a popular one may starve others | those of running adapters pass for 32 steps only | every request is served |
| `timeout` in the body, X-Request-Timeout | no deadlines | 408 if the request only waited, else finish_reason `timeout`, see [operations.md](operations.md#deadlines) | work that nobody waits for |
| `endpoint-load-metrics-format` | `kv_cache_usage_perc`, `num_requests_waiting`; on answers of some endpoints | also `num_requests_running`; on all that generate, streams and refusals too | a balancer learns of a full server from its 429 |
| SIGTERM | aborts what runs | lets it finish, `--shutdown-timeout` 30 s | restarts without failed requests |
| a grammar that no token satisfies, once tokens are chosen | not tried | 400, in a stream an error event with code 400 | it ends one request |

## KV of other instances

`--kv-transfer-config` has vLLM's keys, and `kv_transfer_params` its form, see [disaggregation.md](disaggregation.md).

| case | vLLM 0.33 | Quire | why |
|---|---|---|---|
| KV that does not arrive | `kv_load_failure_policy` fail | recompute | the tokens are the same |
| `remote_host` of a request | connected to | only if it is among `peers` of `kv_connector_extra_config` | a client could choose it |
| `remote_block_ids` | places in P's cache | empty: KV is asked for by the hash of the prompt, with `ticket` | a stale place has another prompt's KV |
| `kv_transfer_params` that cannot have an effect | depends on the connector | `warnings` in the answer, and the prompt is computed | a router may be wrong, its client is not |
| `kv_connector_module_path` | imported | refused | the server runs no code of others |

Connectors are `TCPConnector` and `SharedMemoryConnector`. Of vLLM's others each is an error
that says what to use instead:

"""


def render() -> str:
    rows = [f"| {' | '.join(_row(name, option))} |" for name, option in FOREIGN.items()]
    table = [
        "| Flag | Accepted | Otherwise | Why, or what instead |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    remedies: dict[str, list[str]] = {}
    for name, remedy in NOT_HERE.items():
        remedies.setdefault(remedy, []).append(f"`{name}`")
    connectors = [f"- {', '.join(names)}: {remedy}." for remedy, names in remedies.items()]
    return "\n".join([HEAD, *table, REST + "\n".join([*connectors, ""])])


def _row(name: str, option: Foreign) -> list[str]:
    flags = ["--" + name.replace("_", "-"), *option.short]
    accepted = ", ".join(_value(value) for value in (option.default, *option.also))
    otherwise = "refused" if option.refused else "no effect"
    return [", ".join(f"`{flag}`" for flag in flags), accepted, otherwise, option.why]


def _value(value: object) -> str:
    if value is None or value in ((), "", {}):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"
