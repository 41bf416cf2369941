"""The state that all endpoints of an app share: the engine (once it is loaded), the phase, the live
requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from quire.config import EngineConfig, ServerConfig
from quire.messages import EngineReady, StepOutputs
from quire.metrics import HttpMetrics, StatsLogger, create_metrics, new_registry
from quire.metrics.recent import Latencies, Recent
from quire.metrics.trace_metrics import TraceMetrics
from quire.server.engine_protocol import ServingEngine
from quire.server.errors import RETRY_AFTER_DRAINING, RETRY_AFTER_LOADING, ApiError, unavailable
from quire.server.explanations import Explanations
from quire.server.live import LiveRequests
from quire.server.record import Headers, Record
from quire.server.request_log import log_finished
from quire.server.tracing import Tracer
from quire.text.parsing import output_format

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Phase(str, Enum):
    """The phases of a server, in order."""

    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"
    """After a signal: still serves, but is not ready."""
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(slots=True)
class ServerState:
    """Mutable, because the app is built before the engine, so that probes are answered at once."""

    config: ServerConfig
    engine_config: EngineConfig = field(default_factory=EngineConfig)
    phase: Phase = Phase.LOADING
    engine: ServingEngine | None = None
    failure: str = ""
    live: LiveRequests = field(default_factory=LiveRequests)
    registry: CollectorRegistry = field(default_factory=new_registry)
    http_metrics: HttpMetrics = field(init=False)
    stats_logs: list[StatsLogger] = field(default_factory=list)
    """Of each engine core."""
    recents: list[Recent] = field(default_factory=list)
    """Of each engine core."""
    latencies: Latencies = field(default_factory=Latencies)
    tracer: Tracer | None = None
    """To which finished requests are reported, if an OpenTelemetry collector is named."""

    explanations: Explanations = field(init=False)

    def __post_init__(self) -> None:
        self.explanations = Explanations(self.config)
        self.http_metrics = HttpMetrics(self.registry)
        self.registry.register(
            TraceMetrics(lambda: None if self.tracer is None else self.tracer.exporter)
        )
        # A wrong name must fail at start, not at the first chat.
        output_format(self.config.tool_call_parser, self.config.reasoning_parser, "")

    def engine_loaded(self, engine: ServingEngine) -> None:
        """Start serving. Metrics are created here, because their buckets and labels depend on the model."""
        lora = self.engine_config.lora
        each = engine.ready.replicas or [engine.ready]
        metrics = create_metrics(
            self.registry,
            [cache_info(ready, engine, self.engine_config) for ready in each],
            states=lambda: engine.health(self.config.health_timeout).replicas,
            model_name=engine.model.name,
            max_model_len=engine.model.max_model_len,
            max_adapters=lora.max_loras if lora.enable_lora else None,
            max_drafts=self.engine_config.max_drafts,
        )
        engine.attach_metrics(
            self.latencies.beside(metrics), log_prefixes=self.config.enable_log_requests
        )
        self.stats_logs = [StatsLogger(engine=f"{index:03}") for index in range(len(each))]
        self.recents = [Recent() for _ in each]
        engine.add_stats_listener(self._log_step)
        self.engine = engine
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    async def close(self) -> None:
        """Send the last spans."""
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.exporter.close)

    def new_record(self, headers: Headers) -> Record:
        return Record(
            headers,
            self._report,
            self.explanations.submitted,
            client_timeouts=self.config.use_client_timeouts,
        )

    def _report(self, record: Record) -> None:
        if self.config.request_log:
            log_finished(record)
        if self.tracer is not None:
            self.tracer.report(record)
        self.explanations.ended(record, self.engine)

    def _log_step(self, outputs: StepOutputs) -> None:
        self.stats_logs[outputs.replica].on_step(outputs)
        self.recents[outputs.replica].on_step(outputs)

    def leave(self) -> None:
        """Be unready, and serve."""
        if self.phase is Phase.READY:
            self.phase = Phase.LEAVING

    def drain(self) -> None:
        """Refuse new requests; those in flight continue."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    def fail(self, reason: str) -> None:
        self.phase = Phase.FAILED
        self.failure = reason

    def serving_engine(self) -> ServingEngine:
        """The engine, for a new request. Raises a 503 `ApiError` if it cannot take one."""
        if self.phase in (Phase.READY, Phase.LEAVING) and self.engine is not None:
            return self.engine
        raise self.refusal()

    def loaded_engine(self) -> ServingEngine:
        """The engine, for a question that needs no step; also while draining."""
        if self.engine is None or self.phase is Phase.FAILED:
            raise self.refusal()
        return self.engine

    def refusal(self) -> ApiError:
        if self.phase is Phase.LOADING:
            return unavailable("The model is still loading.", retry_after=RETRY_AFTER_LOADING)
        if self.phase is Phase.DRAINING:
            return unavailable("The server is shutting down.", retry_after=RETRY_AFTER_DRAINING)
        return unavailable("The engine has stopped.", retry_after=RETRY_AFTER_DRAINING)


def cache_info(
    ready: EngineReady, engine: ServingEngine, config: EngineConfig
) -> dict[str, object]:
    """Labels of `vllm:cache_config_info`. Block 0 is the null block and is not counted."""
    cache = config.cache
    tokens = max(0, ready.num_blocks - 1) * ready.block_size
    return {
        "block_size": ready.block_size,
        "num_gpu_blocks": ready.num_blocks,
        "kv_cache_size_tokens": tokens,
        "kv_cache_max_concurrency": f"{tokens / max(1, engine.model.max_model_len):.2f}",
        "enable_prefix_caching": cache.enable_prefix_caching,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "kv_cache_memory_bytes": ready.kv_bytes or cache.kv_cache_memory_bytes,
        "num_gpu_blocks_override": cache.num_gpu_blocks_override,
        "watermark": cache.watermark,
    }
