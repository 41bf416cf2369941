"""Options of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.options import option, parse_size
from quire.errors import ConfigError
from quire.limits import MAX_BAD_WORDS, MAX_N, MAX_STOP_STRINGS

ADMIN_PORT = 8001
_UNBOUNDED = 2**63
_LIMITS = {
    "max_body_bytes": _UNBOUNDED,
    "max_prompts_per_request": _UNBOUNDED,
    "max_sequences_per_request": MAX_N,
    "max_stop_strings": MAX_STOP_STRINGS,
    "max_bad_words": MAX_BAD_WORDS,
    "max_list_items": _UNBOUNDED,
}
"""Option -> the limit of `SamplingParams`, which the option cannot raise."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where the server listens, which clients it accepts, and its limits."""

    host: str | None = option(
        None,
        "Address to listen on. Default: all, as vLLM does; without a key, a warning at start says so.",
    )
    port: int = option(8000, "Port to listen on; 0 picks a free one.")
    uds: str | None = option(None, "Unix socket to listen on, instead of host and port.")
    api_key: tuple[str, ...] = option(
        (),
        "Keys that clients may use; with none, anyone who reaches the address may ask. "
        "Also VLLM_API_KEY, QUIRE_API_KEY.",
    )
    api_keys_file: str | None = option(
        None,
        "File with digests of keys, and the tenants that they belong to, with weights and quotas (TOML; "
        "docs/tenants.md). It is read again when it changes.",
    )
    admin_host: str | None = option(
        None,
        "Address of a listener of its own for the admin endpoints, which the API's then has not. Default, "
        "with --admin-port: 127.0.0.1. Beyond this machine it needs a key.",
    )
    admin_port: int | None = option(
        None, f"Its port; 0 picks a free one. Default, with --admin-host: {ADMIN_PORT}."
    )
    admin_uds: str | None = option(
        None, "Unix socket for it, instead of host and port. Only the server's user may connect."
    )
    admin_api_key: tuple[str, ...] = option(
        (),
        "Keys for the admin endpoints, which no other key opens then, wherever they are served. Also "
        "QUIRE_ADMIN_API_KEY.",
    )
    admin_metrics: bool = option(
        False, "Serve /metrics on the admin listener only. It needs the key there, if there is one."
    )
    disable_playground: bool = option(False, "No page to chat with the model at /.")
    root_path: str = option("", "Path prefix that a proxy in front strips.")
    allowed_origins: tuple[str, ...] = option(("*",), "CORS: origins that browsers may call from.")
    allowed_methods: tuple[str, ...] = option(("*",), "CORS: methods.")
    allowed_headers: tuple[str, ...] = option(("*",), "CORS: headers.")
    allow_credentials: bool = option(False, "CORS: whether browsers may send credentials.")
    ssl_keyfile: str | None = option(None, "TLS key.")
    ssl_certfile: str | None = option(None, "TLS certificate.")
    ssl_ca_certs: str | None = option(None, "Certificates that clients' are checked against.")
    ssl_cert_reqs: int = option(
        0, "Whether clients must show a certificate: 0 no, 1 it is checked if shown, 2 yes."
    )
    uvicorn_log_level: str = option(
        "info", "Log level of the HTTP server.",
        choices=("debug", "info", "warning", "error", "critical", "trace"),
    )  # fmt: skip
    disable_uvicorn_access_log: bool = option(False, "No line per HTTP request.")
    disable_access_log_for_endpoints: str | None = option(
        None, "Paths without such a line, separated by commas. Probes and /metrics never have one."
    )
    disable_fastapi_docs: bool = option(False, "No /docs, /redoc and /openapi.json.")
    enable_log_requests: bool = option(False, "Log each request's id, sizes and parameters.")
    request_log: bool = option(
        False,
        "One line for each finished request: tenant, tokens, times, how it ended; never a text. With "
        "log_format json, an object with these fields.",
    )
    slow_request_ttft: float | None = option(
        None,
        "Log requests whose first token took more seconds than this, with an explanation (explain.md); one "
        "every ten seconds at most.",
    )
    slow_request_itl: float | None = option(
        None, "Log those with more milliseconds between tokens, in the mean."
    )
    slow_request_seconds: float | None = option(
        None, "Log those that took more seconds altogether."
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "OpenTelemetry collector for spans of requests: OTLP over HTTP, as http://collector:4318/v1/traces. "
        "Also OTEL_EXPORTER_OTLP_TRACES_ENDPOINT.",
    )
    trace_sample_ratio: float = option(
        1.0, "Share of requests that are traced, of those whose caller has not decided it."
    )
    use_client_timeouts: bool = option(
        False,
        "End a request that is not streamed when its client stops waiting, by the timeout that openai's and "
        "Anthropic's clients send (x-stainless-read-timeout).",
    )
    enable_tokenizer_info_endpoint: bool = option(
        False, "Serve /tokenizer_info: special tokens and the chat template."
    )
    enable_admin_endpoints: bool = option(
        False,
        "Serve /server_info, /reset_prefix_cache, /sleep, /wake_up, /is_sleeping, /dashboard and /debug/ "
        "(explain.md), and with --enable-lora /v1/load_lora_adapter and /v1/unload_lora_adapter, to all "
        "clients that may send requests, or with --admin-api-key to who has that. An admin listener has "
        "them without this option.",
    )
    enable_force_include_usage: bool = option(
        False, "End every stream with the usage, whether or not the client asked for it."
    )
    return_tokens_as_token_ids: bool = option(
        False, "Show tokens beside logprobs as token_id:N, whether or not the client asked for it."
    )
    response_role: str = option("assistant", "Role of chat answers.")
    tool_call_parser: str = option(
        "auto",
        "How the model writes tool calls: vLLM's name of the format (docs/tools.md lists them). auto: as "
        "its chat template shows; none: calls stay text.",
    )
    reasoning_parser: str = option(
        "auto",
        "How the model marks its reasoning (docs/tools.md). auto: as its chat template shows; none: it "
        "stays in the content.",
    )
    enable_auto_tool_choice: bool = option(
        True, "Accepted for compatibility: tool_choice auto works wherever the format is known."
    )
    shutdown_timeout: float = option(
        30.0,
        "Seconds that running requests get to finish after SIGTERM; 0 aborts them (vLLM's way).",
    )
    drain_delay: float = option(
        0.0,
        "Seconds after SIGTERM in which /ready is 503 already and requests are still served, each on a "
        "connection that is then closed: for proxies and clients that have not noticed yet. Then "
        "shutdown_timeout begins.",
    )
    health_timeout: float = option(
        60.0, "Seconds without a heartbeat of the scheduler loop before /health answers 503."
    )
    max_body_bytes: int = option(
        8 * 2**20, "Largest request body; more is a 413.", parse=parse_size
    )
    max_prompts_per_request: int = option(1024, "Most prompts in one completion request.")
    max_sequences_per_request: int = option(
        MAX_N, "Most sequences that one request may ask for: its prompts, times n."
    )
    max_stop_strings: int = option(4, "Most stop strings in one request.")
    max_bad_words: int = option(128, "Most bad_words in one request.")
    max_list_items: int = option(
        2**18, "Most entries of a request's stop_token_ids, allowed_token_ids or logit_bias."
    )
    max_stored_responses: int = option(
        1024, "Most responses of /v1/responses kept in memory; 0 keeps none."
    )
    max_stored_response_bytes: int = option(
        64 * 2**20, "Most memory for them, counted as JSON.", parse=parse_size
    )
    strict_requests: bool = option(
        False,
        "Answer 400 to a field that is unknown or has no effect, instead of serving the request with a "
        "warning.",
    )
    sse_keep_alive_interval: float = option(
        15.0, "Seconds without data before a stream gets a comment line; 0 is never."
    )
    log_stats_interval: float = option(10.0, "Seconds between throughput lines in the log.")
    per_request_spec_decode_metrics: str = option(
        "summary",
        "With speculative decoding, what an answer with one sequence says of its drafts "
        "(`metrics.speculative_decoding`): nothing, counts, or also the counts of every step.",
        choices=("none", "summary", "detailed"),
    )

    @property
    def has_admin_listener(self) -> bool:
        return (self.admin_host, self.admin_port, self.admin_uds) != (None, None, None)

    def __post_init__(self) -> None:
        for name in ("port", "admin_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ConfigError(f"{name} must be in [0, 65535], got {port}.")
        if self.admin_uds is not None and (self.admin_host, self.admin_port) != (None, None):
            raise ConfigError("admin_uds is instead of admin_host and admin_port: leave those out.")
        if self.admin_metrics and not self.has_admin_listener:
            raise ConfigError("admin_metrics needs an admin listener: set admin_port or admin_uds.")
        for name in (
            "shutdown_timeout", "drain_delay", "sse_keep_alive_interval", "health_timeout",
            "max_stored_responses", "max_stored_response_bytes",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:  # so written, NaN fails too
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("slow_request_ttft", "slow_request_itl", "slow_request_seconds"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise ConfigError(f"{name} must be at least 0, got {limit}; leave it out for none.")
        if not self.log_stats_interval > 0:
            raise ConfigError(
                f"log_stats_interval must be greater than 0, got {self.log_stats_interval}. "
                "To silence the line, set disable_log_stats."
            )
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ConfigError(
                f"trace_sample_ratio must be in [0, 1], got {self.trace_sample_ratio}."
            )
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                upper = f" and at most {most}" if most < _UNBOUNDED else ""
                raise ConfigError(f"{name} must be at least 1{upper}, got {value}.")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"ssl_cert_reqs must be 0, 1 or 2, got {self.ssl_cert_reqs}.")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile go together: give both or neither.")
