"""The options of `quire bench`: a field is a flag and a row of docs/bench-options.md.

Names and defaults are those of vLLM 0.32's `vllm bench`, so that scripts work unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quire.bench.agents import AgentShape
from quire.config.options import OptionInfo, describe, option, parse_json_object
from quire.errors import ConfigError

DATASETS = (
    "random", "sharegpt", "sharegpt-synthetic", "prefix_repetition", "custom", "timed_trace",
    "agents",
)  # fmt: skip
METRICS = ("ttft", "tpot", "itl", "e2el")


def _metrics(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"expected some of {','.join(METRICS)}, got {name!r}.")
    return ",".join(names)


def _percentiles(text: str) -> str:
    for part in text.split(","):
        if not 0 <= float(part) <= 100:
            raise ConfigError(f"expected numbers in [0, 100], comma-separated, got {text!r}.")
    return text.replace(" ", "")


def _range_text(text: str) -> str:
    low, high = _range(text)
    return f"{low}-{high}"


def _range(text: str) -> tuple[int, int]:
    """`100-600`, or one number for both ends."""
    low, _, high = text.partition("-")
    try:
        ends = int(low), int(high or low)
    except ValueError:
        ends = 0, 0
    if not 1 <= ends[0] <= ends[1]:
        raise ConfigError(f"expected LOW-HIGH with 1 <= LOW <= HIGH, got {text!r}.")
    return ends


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """The server, and its API."""

    base_url: str | None = option(
        None, "Server, such as http://host:8000, instead of host and port."
    )
    host: str = option("127.0.0.1", "Server's address.")
    port: int = option(8000, "Server's port.")
    endpoint: str | None = option(
        None, "Path to post to. Default: /v1/completions; /v1/chat/completions for openai-chat."
    )
    backend: str | None = option(
        None,
        "Dialect: openai and vllm are completions, openai-chat is chat. "
        "Default: openai, or openai-chat if the endpoint is a chat one.",
        choices=("openai", "openai-chat", "vllm"),
    )
    model: str | None = option(
        None, "Model to ask for. Default: the first that the server lists in /v1/models."
    )
    served_model_name: str | None = option(
        None, "The name in requests, where it is not that of the model's files."
    )
    tokenizer: str | None = option(
        None, "Directory or hub id of the tokenizer that counts and makes prompts. Default: the model's."
    )  # fmt: skip
    api_key: str | None = option(
        None, "Sent as a bearer token. Also QUIRE_API_KEY, OPENAI_API_KEY.", metavar="KEY"
    )
    header: tuple[str, ...] = option((), "More headers, each KEY=VALUE.", metavar="KEY=VALUE")
    insecure: bool = option(False, "Accept any TLS certificate.")
    ready_check_timeout_sec: float = option(
        0.0, "Seconds to wait for the server to answer /v1/models before the run; 0 is not to."
    )
    request_timeout: float = option(
        21600.0, "Seconds after which a request is given up and counted as failed."
    )
    temperature: float | None = option(None, "Sampling. Default: the server's own.")
    top_p: float | None = option(None, "Sampling. Default: the server's own.")
    top_k: int | None = option(None, "Sampling. Default: the server's own.")
    ignore_eos: bool = option(
        False, "Ask for exactly the output length. random turns it on, as in vLLM, and agents."
    )
    extra_body: dict[str, object] = option(
        {}, "JSON object of more request fields.", parse=parse_json_object, metavar="JSON"
    )

    def __post_init__(self) -> None:
        if not 0 < self.port <= 65535:
            raise ConfigError(f"port must be in [1, 65535], got {self.port}.")
        if self.endpoint is not None and not self.endpoint.startswith("/"):
            raise ConfigError(f"endpoint must begin with a slash, got {self.endpoint!r}.")
        chat = self.endpoint is not None and self.endpoint.endswith("/chat/completions")
        both = self.endpoint is not None and self.backend is not None
        if both and chat != (self.backend == "openai-chat"):
            raise ConfigError(
                f"backend {self.backend} does not speak to endpoint {self.endpoint}; "
                "leave one of the two out."
            )
        if not self.ready_check_timeout_sec >= 0:
            raise ConfigError(
                f"ready_check_timeout_sec must be at least 0, got {self.ready_check_timeout_sec}."
            )
        if not self.request_timeout > 0:
            raise ConfigError(
                f"request_timeout must be greater than 0, got {self.request_timeout}."
            )
        for pair in self.header:
            if "=" not in pair or "\n" in pair or "\r" in pair:
                raise ConfigError(f"header must be KEY=VALUE, got {pair!r}.")

    @property
    def chat(self) -> bool:
        if self.backend is not None:
            return self.backend == "openai-chat"
        return self.endpoint is not None and self.endpoint.endswith("/chat/completions")

    @property
    def path(self) -> str:
        return self.endpoint or ("/v1/chat/completions" if self.chat else "/v1/completions")

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (self.base_url or f"http://{host}:{self.port}").rstrip("/")


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """The prompts: their number, lengths and shared prefixes."""

    dataset_name: str = option(
        "random",
        "Where prompts come from; sharegpt-synthetic is generated, with ShareGPT's lengths; "
        "agents is sessions of many turns, for serve.",
        choices=DATASETS,
    )
    dataset_path: str | None = option(None, "File of sharegpt, custom or timed_trace.")
    num_prompts: int = option(1000, "Requests to send.")
    seed: int = option(0, "Seeds the dataset and the arrival times.")
    disable_shuffle: bool = option(False, "Take a file's entries in their order.")
    no_oversample: bool = option(
        False, "Send fewer requests where the file has fewer entries; else entries repeat."
    )
    prompt_token_ids: bool = option(
        False,
        "Send generated prompts as token ids (completions only): exact lengths for any tokenizer.",
    )
    sharegpt_output_len: int | None = option(
        None, "Output length for all. Default: that of the answer in the file."
    )
    random_input_len: int = option(1024, "Prompt tokens.", aliases=("--input-len",))
    random_output_len: int = option(128, "Output tokens.", aliases=("--output-len",))
    random_range_ratio: float = option(
        0.0, "Lengths are uniform in [len * (1 - ratio), len * (1 + ratio)]; in [0, 1)."
    )
    random_prefix_len: int = option(0, "Tokens before the random ones that all prompts share.")
    prefix_repetition_prefix_len: int = option(256, "Tokens of a shared prefix.")
    prefix_repetition_suffix_len: int = option(256, "Tokens of a prompt's own.")
    prefix_repetition_num_prefixes: int = option(10, "Different prefixes.")
    prefix_repetition_output_len: int = option(128, "Output tokens.")
    custom_output_len: int = option(
        256, "Output tokens where an entry has no output_tokens; -1 requires that it has."
    )
    timed_trace_sec_multiplier: float = option(
        1.0, "Seconds per unit of the trace's timestamp: 0.001 for Mooncake's milliseconds."
    )
    timed_trace_chunk_hash_size: int = option(
        16, "Prompt tokens that one of hash_ids stands for: 512 in Mooncake's traces."
    )
    agents_sessions: int = option(
        8, "Agents at once; each sends a turn after the answer to the last."
    )
    agents_turns: int = option(12, "Turns of a session.")
    agents_system_len: int = option(
        1500, "Tokens of the system prompt that all sessions share: tool schemas."
    )
    agents_tool_len: str = option(
        "100-600",
        "Tokens of the tool result that a turn adds.",
        parse=_range_text,
        metavar="LOW-HIGH",
    )
    agents_output_len: str = option(
        "20-120", "Output tokens of a turn.", parse=_range_text, metavar="LOW-HIGH"
    )
    agents_think_time: float = option(
        1.0, "Seconds between the end of an answer and the session's next turn."
    )
    agents_edit_share: float = option(
        0.25, "Share of later turns that first replace an earlier tool result; in [0, 1]."
    )

    def __post_init__(self) -> None:
        at_least_one = [
            "num_prompts", "random_input_len", "random_output_len", "prefix_repetition_num_prefixes",
            "prefix_repetition_output_len", "prefix_repetition_suffix_len",
            "timed_trace_chunk_hash_size", "agents_sessions", "agents_turns", "agents_system_len",
        ]  # fmt: skip
        _at_least(self, at_least_one, 1)
        _at_least(self, ["random_prefix_len", "prefix_repetition_prefix_len", "seed"], 0)
        if self.sharegpt_output_len is not None and self.sharegpt_output_len < 1:
            raise ConfigError(
                f"sharegpt_output_len must be at least 1, got {self.sharegpt_output_len}."
            )
        if self.custom_output_len < 1 and self.custom_output_len != -1:
            raise ConfigError(
                f"custom_output_len must be at least 1, or -1, got {self.custom_output_len}."
            )
        if not 0 <= self.random_range_ratio < 1:
            raise ConfigError(
                f"random_range_ratio must be in [0, 1), got {self.random_range_ratio}."
            )
        if not 0 < self.timed_trace_sec_multiplier < math.inf:
            raise ConfigError(
                "timed_trace_sec_multiplier must be greater than 0 and finite, "
                f"got {self.timed_trace_sec_multiplier}."
            )
        if not 0 <= self.agents_think_time < math.inf:
            raise ConfigError(
                f"agents_think_time must be at least 0 and finite, got {self.agents_think_time}."
            )
        if not 0 <= self.agents_edit_share <= 1:
            raise ConfigError(f"agents_edit_share must be in [0, 1], got {self.agents_edit_share}.")
        needs_file = self.dataset_name in ("sharegpt", "custom", "timed_trace")
        if needs_file and self.dataset_path is None:
            raise ConfigError(f"dataset_name {self.dataset_name} needs --dataset-path FILE.")
        if not needs_file and self.dataset_path is not None:
            raise ConfigError(
                f"dataset_path is not read by dataset_name {self.dataset_name}; remove one."
            )

    @property
    def agents(self) -> AgentShape:
        return AgentShape(
            sessions=self.agents_sessions,
            turns=self.agents_turns,
            system_len=self.agents_system_len,
            tool_len=_range(self.agents_tool_len),
            output_len=_range(self.agents_output_len),
            think_time=self.agents_think_time,
            edit_share=self.agents_edit_share,
        )


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """When requests are sent."""

    request_rate: float = option(
        math.inf, "Requests per second; inf sends all at once, and timed_trace has its own times."
    )
    burstiness: float = option(
        1.0, "Shape of the gamma distribution of gaps: 1 is Poisson, less is burstier, more is evener."
    )  # fmt: skip
    max_concurrency: int | None = option(
        None, "Most requests in flight; others wait in the client, and are late."
    )
    ramp_up_strategy: str | None = option(
        None, "Change the rate over the run, from start to end.", choices=("linear", "exponential")
    )
    ramp_up_start_rps: float | None = option(None, "Rate at the first request.")
    ramp_up_end_rps: float | None = option(None, "Rate at the last request.")
    num_warmups: int = option(0, "Requests sent first and not counted.")

    def __post_init__(self) -> None:
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0, got {getattr(self, name)}.")
        if self.burstiness == math.inf:
            raise ConfigError("burstiness must be finite; 1000 is as good as even.")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max_concurrency must be at least 1, got {self.max_concurrency}.")
        _at_least(self, ["num_warmups"], 0)
        ends = {
            "ramp_up_start_rps": self.ramp_up_start_rps,
            "ramp_up_end_rps": self.ramp_up_end_rps,
        }
        for name, rps in ends.items():
            if self.ramp_up_strategy is None and rps is not None:
                raise ConfigError(f"{name} needs --ramp-up-strategy linear or exponential.")
            if self.ramp_up_strategy is not None and not (rps and 0 < rps < math.inf):
                raise ConfigError(
                    f"{name} must be greater than 0 with ramp_up_strategy, got {rps}."
                )
        if self.ramp_up_strategy is not None and self.request_rate != math.inf:
            raise ConfigError("ramp_up_strategy sets the rate; remove --request-rate.")


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What is printed, and what is saved."""

    percentile_metrics: str = option(
        "ttft,tpot,itl", "Metrics in the table: some of ttft, tpot, itl, e2el.", parse=_metrics
    )
    metric_percentiles: str = option(
        "99", "Percentiles in table and JSON, comma-separated.", parse=_percentiles
    )
    goodput: tuple[str, ...] = option(
        (), "Objectives in milliseconds, such as ttft:500 tpot:50 e2el:2000.", metavar="NAME:MS"
    )
    save_result: bool = option(False, "Write the result as JSON.")
    save_detailed: bool = option(False, "With each request's lengths, times, text and error.")
    result_dir: str | None = option(None, "Folder for it. Default: the current one.")
    result_filename: str | None = option(
        None, "Its name. Default: from backend, rate, concurrency, model and date."
    )
    metadata: tuple[str, ...] = option((), "More entries for it, each KEY=VALUE.", metavar="K=V")
    label: str | None = option(None, "Takes the backend's place in the file's name.")
    plot: str | None = option(
        None, "Picture of latencies and of every request's life (.png, .svg, .pdf).", metavar="FILE"
    )
    disable_tqdm: bool = option(
        False, "No progress bar. There is none unless stderr is a terminal."
    )

    def __post_init__(self) -> None:
        parse_goodput(self.goodput)
        for pair in self.metadata:
            if "=" not in pair:
                raise ConfigError(f"metadata must be KEY=VALUE, got {pair!r}.")

    @property
    def percentiles(self) -> list[float]:
        return [float(part) for part in self.metric_percentiles.split(",")]


def parse_goodput(pairs: tuple[str, ...]) -> dict[str, float]:
    """Objectives in seconds, by metric."""
    slos: dict[str, float] = {}
    for pair in pairs:
        name, colon, text = pair.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if not colon or name not in ("ttft", "tpot", "e2el") or not limit > 0:
            raise ConfigError(
                f"goodput must be NAME:MILLISECONDS with NAME ttft, tpot or e2el, got {pair!r}."
            )
        if name in slos:
            raise ConfigError(f"goodput names {name} twice.")
        slos[name] = limit / 1000
    return slos


GROUPS: dict[str, type] = {
    "server": TargetOptions,
    "dataset": DatasetOptions,
    "load": LoadOptions,
    "report": ReportOptions,
}


def bench_options(*groups: str) -> list[OptionInfo]:
    """The options of these groups (all if none is given), in the order of the docs."""
    return [info for name in groups or GROUPS for info in describe(GROUPS[name], name)]


def _at_least(options: object, names: list[str], least: int) -> None:
    for name in names:
        if getattr(options, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(options, name)}.")
