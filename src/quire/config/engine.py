"""The engine's options. Frozen; nothing here is computed from the model (see `quire.engine.setup`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from quire.config.kv import STAGING_BYTES, KVTiersConfig
from quire.config.kv_events import KVEventsConfig
from quire.config.kv_transfer import KVTransferConfig
from quire.config.lora import LoRAConfig
from quire.config.options import option, parse_json_object, parse_max_model_len, parse_size
from quire.config.parallel import ParallelConfig
from quire.config.recovery import RecoveryConfig
from quire.config.speculative import SpeculativeConfig
from quire.dtypes import FLOAT_SPELLINGS
from quire.errors import ConfigError

MAX_DRAFTED_SAMPLES = 128
"""Bound on the tokens that a step samples if more than `max_num_seqs` are possible because of drafts."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model, and how its files are read."""

    model: str | None = option(
        None,
        "Local directory, GGUF file or hub id (owner/name; owner/name:Q4_K_M of GGUF files). "
        "Default: the built-in model.",
        positional=True,
    )
    served_model_name: tuple[str, ...] = option(
        (), "Names clients may use; the first is reported by /v1/models and in metrics."
    )
    tokenizer: str | None = option(
        None, "Directory, GGUF file or hub id of the tokenizer. Default: the model's."
    )
    revision: str | None = option(None, "Branch, tag or commit on the hub, for every file.")
    dtype: str = option(
        "auto",
        "Type of weights and activations. auto: the checkpoint's own; float32 stays float32.",
        choices=("auto", *FLOAT_SPELLINGS),
    )
    quantization: str | None = option(
        None,
        "For an unquantized checkpoint: int8, int4 or fp8_per_channel rounds its matrices as they are "
        "loaded. For a quantized one: the format that it must have (awq, gptq, fp8, ...). Default: as the "
        "checkpoint is.",
        aliases=("-q",),
    )
    max_model_len: int | None = option(
        None,
        "Most tokens of prompt and output together: 4096, 4k, 4K; -1 or auto fits it to memory. "
        "Default: what the model was trained for.",
        parse=parse_max_model_len,
    )
    hf_overrides: dict[str, object] = option(
        {}, "JSON object of config.json fields to replace; null sets a field to null.",
        parse=parse_json_object, metavar="JSON",
    )  # fmt: skip
    load_format: str = option(
        "auto",
        "auto and safetensors read the checkpoint, of any kind; dummy makes random weights of its shape.",
        choices=("auto", "safetensors", "dummy"),
    )
    download_dir: str | None = option(None, "Where hub files are kept. Default: the hub's cache.")
    hf_token: str | None = option(None, "Access token for gated hub models.")
    seed: int = option(0, "Seeds dummy weights.")
    generation_config: str = option(
        "auto",
        "auto: default sampling parameters come from the model's generation_config.json; "
        "vllm: neutral defaults; or a directory to read that file from.",
    )
    override_generation_config: dict[str, object] = option(
        {}, "JSON object of sampling defaults that take precedence over generation_config.json.",
        parse=parse_json_object, metavar="JSON",
    )  # fmt: skip
    max_logprobs: int = option(20, "Most logprobs a request may ask for; -1 is no limit.")
    logprobs_mode: str = option(
        "raw_logprobs",
        "raw: logprobs are of the model's logits. processed: of the logits that are sampled from, after "
        "penalties, bias, masks, temperature and filters.",
        choices=("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
    )
    chat_template: str | None = option(
        None, "Jinja file, or the template itself. Default: the tokenizer's."
    )
    chat_template_content_format: str = option(
        "auto", "How message content reaches the template.", choices=("auto", "string", "openai")
    )

    def __post_init__(self) -> None:
        length = self.max_model_len
        if length is not None and length != -1 and length < 1:
            raise ConfigError(f"max_model_len must be at least 1, or -1 for auto, got {length}.")
        if self.max_logprobs < -1:
            raise ConfigError(
                f"max_logprobs must be at least 0, or -1 for no limit, got {self.max_logprobs}."
            )
        if self.model == "":
            raise ConfigError("model must not be empty; leave it out for the built-in model.")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = option(
        16, "Token slots in a block: 16, 32, 64 or 128. Default: 16; on a GPU 64."
    )
    gpu_memory_utilization: float | None = option(
        None,
        "Share (0-1] of the device's memory that weights, activations and KV cache may use. "
        "Default: on a GPU 0.9; on the CPU half of the memory now available.",
    )
    kv_cache_memory_bytes: int | None = option(
        None, "Bytes for the KV cache, instead of a share of memory: 512M, 4G.", parse=parse_size
    )
    kv_cache_dtype: str = option(
        "auto",
        "How keys and values are stored. auto: in the model's dtype; fp8 (e4m3): half the memory of "
        "16 bits, and about one digit of precision.",
        choices=("auto", "fp8", "fp8_e4m3"),
    )
    num_gpu_blocks_override: int | None = option(
        None, "Exactly this many KV blocks, whatever the memory. For tests."
    )
    enable_prefix_caching: bool = option(True, "Reuse the KV of prompts that begin alike.")
    watermark: float = option(
        0.01,
        "Share of blocks kept free when a request is admitted beside running ones, "
        "so that those can grow without preemption.",
    )
    retained_cache_share: float = option(
        0.5,
        "Most of the blocks, as a share, that clients can have kept in the cache longer than others (fields "
        "cache_control, prompt_cache_retention and retain_seconds). 0: none.",
    )

    def __post_init__(self) -> None:
        if self.block_size not in (16, 32, 64, 128):
            raise ConfigError(f"block_size must be 16, 32, 64 or 128, got {self.block_size}.")
        share = self.gpu_memory_utilization
        if share is not None and not 0.0 < share <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {share}.")
        if self.kv_cache_memory_bytes is not None and self.kv_cache_memory_bytes <= 0:
            raise ConfigError(
                f"kv_cache_memory_bytes must be positive, got {self.kv_cache_memory_bytes}."
            )
        if self.num_gpu_blocks_override is not None and self.num_gpu_blocks_override < 2:
            raise ConfigError(
                f"num_gpu_blocks_override must be at least 2, got {self.num_gpu_blocks_override}."
            )
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark must be in [0, 1), got {self.watermark}.")
        if not 0.0 <= self.retained_cache_share <= 1.0:
            raise ConfigError(
                f"retained_cache_share must be in [0, 1], got {self.retained_cache_share}."
            )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How the batch of each step is formed."""

    max_num_seqs: int = option(
        128,
        "Most requests that run at once. Default: 128; on a GPU 256, or 512 if it has 64 GiB or more.",
        parse=parse_size,
    )
    max_num_batched_tokens: int = option(
        2048,
        "Token budget of one step, decode and prefill together. Default: 2048; on a GPU with 64 GiB or more "
        "8192.",
        parse=parse_size,
    )
    enable_chunked_prefill: bool = option(
        True, "Split long prompts over steps. When off, a prompt runs whole or waits."
    )
    long_prefill_token_threshold: int = option(
        0, "Most tokens of one request in one step; 0 is no limit but the budget.",
        parse=parse_size,
    )  # fmt: skip
    itl_target: float | None = option(
        None,
        "Milliseconds that a step should take at most while requests generate: prompts are divided into "
        "pieces that fit, by the measured time of steps. A step computes at least a block of tokens of them.",
    )
    cost_model: str | None = option(
        None,
        "File that `quire bench fit` has written for this model on this machine: what a step takes is known "
        "from the first one on, and learned further. By default it is learned from the steps alone.",
    )
    scheduling_policy: str = option(
        "auto",
        "fcfs: by arrival. priority: lower `priority` first, then arrival. fair: lower `priority` first, "
        "then equal shares for tenants, by their weights. auto: fair if a server has several API keys or a "
        "file of them, else fcfs.",
        choices=("auto", "fcfs", "priority", "fair"),
    )
    priority_aging: float = option(
        60.0,
        "With fair: seconds after which a tenant whose requests of some priority get no turn has its first "
        "one moved up to the best priority, for each priority that is before it. 0: never.",
    )
    stream_interval: int = option(
        1, "Tokens per streamed output, at least; the first comes at once."
    )
    max_num_queued_reqs: int | None = option(
        1024,
        "Most requests that wait; more are answered 429 with Retry-After. 0 is no limit. When it is reached, "
        "tenants that hold less than their share by weight may still queue (tenants.md).",
        parse=parse_size,
    )
    max_num_queued_tokens: int | None = option(
        None,
        "Most prompt tokens that wait; more are answered 429. Divided among tenants in the same way.",
        parse=parse_size,
    )
    max_ttft: float | None = option(
        None,
        "Seconds that a request may wait before it starts. One that is predicted to wait longer is refused "
        "at once: 429 with the prediction and Retry-After. The time of its own prompt does not count.",
    )
    decision_record_bytes: int = option(
        8 << 20,
        "Bytes of memory for the record of what the scheduler was given and decided, of which the oldest is "
        "dropped; it has lengths and salted hashes, no texts (explain.md). 0: none.",
        parse=parse_size,
    )
    decision_record_dir: str | None = option(
        None,
        "Directory for the record of an engine core that fails, and of all on SIGUSR1. Default: none at a "
        "failure, and on the signal the directory for temporary files.",
    )

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), so that every running request can advance in "
                "every step. Raise the first or lower the second."
            )
        if not 0.0 <= self.priority_aging < float("inf"):
            raise ConfigError(
                f"priority_aging must be at least 0 seconds (0: never), got {self.priority_aging}."
            )
        if self.stream_interval < 1:
            raise ConfigError(f"stream_interval must be at least 1, got {self.stream_interval}.")
        if self.long_prefill_token_threshold < 0:
            raise ConfigError(
                "long_prefill_token_threshold must be at least 0, "
                f"got {self.long_prefill_token_threshold}."
            )
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ConfigError(
                "long_prefill_token_threshold splits prompts, which enable_chunked_prefill=False "
                "forbids; leave one of them out."
            )
        if self.decision_record_bytes < 0:
            raise ConfigError(
                f"decision_record_bytes must be at least 0 (none), got {self.decision_record_bytes}."
            )
        for name in ("itl_target", "max_ttft"):
            seconds = getattr(self, name)
            if seconds is not None and not 0.0 < seconds < float("inf"):
                raise ConfigError(f"{name} must be positive, got {seconds}; leave it out for none.")
        if self.itl_target and not self.enable_chunked_prefill:
            raise ConfigError(
                "itl_target splits prompts, which enable_chunked_prefill=False forbids; leave one of them "
                "out."
            )
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            limit = getattr(self, name)
            if limit is not None and limit < 0:
                raise ConfigError(f"{name} must be at least 0 (no limit), got {limit}.")


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """The device and the implementations that run the model."""

    device: str = option(
        "auto",
        "Where the model runs. auto: the first GPU, if there is one that PyTorch can use; else the CPU.",
        choices=("auto", "cpu", "cuda"),
    )
    kernels: str = option(
        "auto",
        "CPU kernels. native: compiled C, an error if there is no compiler; reference: PyTorch.",
        choices=("auto", "native", "reference"),
    )
    cpu_threads: int | None = option(
        None,
        "Threads that compute. Default: the physical cores that this process may use, within its container's "
        "CPU limit.",
    )
    cpu_activation_bits: int = option(
        16,
        "On the CPU: the inputs of int4 and int8 matrices are rounded to integers of so many bits, 16 or 8. "
        "8 makes prompts faster and results less exact. W8A8 checkpoints are computed with 8, as they say.",
    )
    attention_backend: str = option(
        "auto",
        "On a GPU: who computes attention. triton: Quire's own kernels, which auto takes; flash_attn: "
        "FlashAttention-3 or -4, flashinfer: FlashInfer, if installed. vLLM's names for them work too.",
        choices=(
            "auto",
            "triton",
            "flash_attn",
            "flashinfer",
            "TRITON_ATTN",
            "FLASH_ATTN",
            "FLASHINFER",
        ),
    )
    enforce_eager: bool = option(
        False, "On a GPU: launch every step kernel by kernel, use no CUDA graphs."
    )
    async_scheduling: bool = option(
        True, "On a GPU: plan and launch a step while the one before it runs."
    )
    batch_invariant: bool = option(
        False,
        "On a GPU: make a request's logits independent of the other requests in its batch, as they always "
        "are on the CPU. Costs speed.",
    )
    disable_log_stats: bool = option(False, "No periodic line with throughput and cache use.")
    log_format: str = option(
        "text", "Log lines for people, or one JSON object each.", choices=("text", "json")
    )

    def __post_init__(self) -> None:
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ConfigError(f"cpu_threads must be at least 1, got {self.cpu_threads}.")
        if self.cpu_activation_bits not in (8, 16):
            raise ConfigError(
                f"cpu_activation_bits must be 8 or 16, got {self.cpu_activation_bits}."
            )


@dataclass(frozen=True, slots=True)
class StructuredOutputsConfig:
    """Limits for the grammars of requests."""

    max_grammar_bytes: int = option(
        512 * 2**10,
        "Largest grammar of a request; descriptions and other annotations of JSON schemas do not count. "
        "More is a 400.",
        parse=parse_size,
    )
    json_whitespace: str = option(
        "bounded",
        "White space in JSON that must match a schema, where the request does not say. bounded: a space, or "
        "one or two line ends and up to 40 characters of indentation; any: as much as the model likes; none: "
        "compact.",
        choices=("bounded", "any", "none"),
    )

    def __post_init__(self) -> None:
        if self.max_grammar_bytes < 1:
            raise ConfigError(
                f"max_grammar_bytes must be at least 1, got {self.max_grammar_bytes}."
            )


BY_DEVICE = ("block_size", "max_num_seqs", "max_num_batched_tokens")
LARGE_GPU = 64 << 30
"""Bytes of memory."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All options of an engine; `quire.config.from_flat` builds one from flat names."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    structured: StructuredOutputsConfig = field(default_factory=StructuredOutputsConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    kv_tiers: KVTiersConfig = field(default_factory=KVTiersConfig)
    kv_transfer: KVTransferConfig = field(default_factory=KVTransferConfig)
    kv_events: KVEventsConfig = field(default_factory=KVEventsConfig)
    by_device: tuple[str, ...] = BY_DEVICE
    """Options that were not given and whose defaults depend on the device: see `on_gpu`."""

    def __post_init__(self) -> None:
        if not self.moves_kv:
            return
        transfer = self.kv_transfer.transfer
        if not self.cache.enable_prefix_caching:
            names = ("kv_transfer_config", "swap_space", "kv_offloading_size", "kv_disk_path")
            given = [name for name in names if self._gives(name)]
            raise ConfigError(
                f"{', '.join(given)} and enable_prefix_caching=False: KV outside the cache is found by the "
                "hash of its prefix; leave one of them out."
            )
        if transfer is not None and self.parallel.nnodes > 1:
            raise ConfigError(
                f"kv_transfer_config needs all ranks on one machine; nnodes is {self.parallel.nnodes}."
            )

    def on_gpu(self, memory_bytes: int) -> EngineConfig:
        """With a GPU's defaults for what was not given. One with much memory has the arithmetic for larger
        steps. memory_bytes: of the GPU."""
        large, options = memory_bytes >= LARGE_GPU, self.scheduler
        tokens, seqs = options.max_num_batched_tokens, options.max_num_seqs
        if "max_num_batched_tokens" in self.by_device:
            tokens = max(8192 if large else 2048, seqs)
        if "max_num_seqs" in self.by_device:
            seqs = min(512 if large else 256, tokens)
        size = 64 if "block_size" in self.by_device else self.cache.block_size
        return dataclasses.replace(
            self,
            cache=dataclasses.replace(self.cache, block_size=size),
            scheduler=dataclasses.replace(
                options, max_num_seqs=seqs, max_num_batched_tokens=tokens
            ),
            by_device=(),
        )

    def _gives(self, name: str) -> bool:
        return bool(getattr(self.kv_tiers, name, None) or getattr(self.kv_transfer, name, None))

    @property
    def moves_kv(self) -> bool:
        """Whether there is any store of KV outside the cache."""
        return self.kv_tiers.has_tiers or self.kv_transfer.transfer is not None

    def host_bytes(self, *, tier: bool = True) -> int:
        """Host memory of each rank for KV outside the cache, at most. tier: with the tier there."""
        transfer, tiers = self.kv_transfer.transfer, self.kv_tiers
        found = tiers.ram_bytes(self.parallel.world_size) if tier else 0
        found += STAGING_BYTES if tiers.has_tiers else 0
        return found + (transfer.kv_buffer_size if transfer and transfer.produces else 0)

    @property
    def kv_load_failure_policy(self) -> str:
        """recompute or fail."""
        transfer = self.kv_transfer.transfer
        own = None if transfer is None else transfer.kv_load_failure_policy
        return own or self.kv_tiers.kv_load_failure_policy

    @property
    def max_drafts(self) -> int:
        """The most drafts that are proposed and verified for a request in a step; 0 without speculation."""
        speculation = self.speculative.speculation
        return 0 if speculation is None else speculation.num_speculative_tokens

    @property
    def max_samples(self) -> int:
        """The most tokens that a step samples: for so many logits every device has memory. Many requests
        leave no time for drafts, so there is no need for room for all drafts of all requests."""
        most = self.scheduler.max_num_seqs
        return max(most, min(most * (1 + self.max_drafts), MAX_DRAFTED_SAMPLES))
