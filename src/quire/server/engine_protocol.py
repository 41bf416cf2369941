"""The methods of an engine that the server uses. `quire.engine.async_llm.AsyncLLM` has them; so have
fakes in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from quire.lora.request import LoRARequest
from quire.messages import EngineReady, SchedulerStats, StepOutputs
from quire.metrics import MetricsSink
from quire.outputs import RequestOutput
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.text.parsing import ThinkingTokens
from quire.text.tokenizer_config import TokenizerConfig


class ServedTokenizer(Protocol):
    """The part of `quire.text.Tokenizer` that endpoints use."""

    @property
    def config(self) -> TokenizerConfig: ...

    @property
    def special_texts(self) -> frozenset[str]: ...

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        truncate_to: int | None = None,
        truncation_side: Literal["left", "right"] = "left",
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_str(self, token_id: int) -> str | None: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def decode_token(self, token_id: int) -> str: ...


class ServedTemplate(Protocol):
    """The part of `quire.text.ChatTemplate` that endpoints use."""

    @property
    def source(self) -> str: ...

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        **kwargs: object,
    ) -> str: ...


class ServedModel(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_logprobs(self) -> int: ...
    @property
    def created(self) -> int: ...
    @property
    def default_sampling(self) -> Mapping[str, object]: ...
    @property
    def tokenizer(self) -> ServedTokenizer: ...
    @property
    def chat_template(self) -> ServedTemplate | None: ...


class ServedAdapter(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def request(self) -> LoRARequest: ...


class ServedAdapters(Protocol):
    """See `quire.engine.async_adapters.AsyncAdapters`."""

    def __iter__(self) -> Iterator[ServedAdapter]: ...

    async def find(self, name: str) -> ServedAdapter | None: ...

    async def load(self, name: str, path: str, *, replace: bool = False) -> None: ...

    async def unload(self, name: str) -> None: ...


class RequestStream(Protocol):
    """Outputs of one request. Ends after the output with `finished`; raises `EngineError`s."""

    @property
    def request_id(self) -> str: ...

    @property
    def sequence_ids(self) -> Sequence[int]:
        """The engine's ids of its sequences. None of a beam search, which makes new ones all the time."""

    @property
    def last(self) -> RequestOutput | None:
        """The latest output, whether or not it has been read."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    def abort(self) -> None: ...


class Health(Protocol):
    """`alive` is False if the engine is dead, or has not answered within the given timeout."""

    @property
    def alive(self) -> bool: ...
    @property
    def heartbeat_age(self) -> float: ...
    @property
    def reason(self) -> str: ...
    @property
    def replicas(self) -> Sequence[str]:
        """Of each engine core: "ok", "silent", "restarting" or "stopped"."""
        ...


class ServingEngine(Protocol):
    @property
    def model(self) -> ServedModel: ...
    @property
    def ready(self) -> EngineReady: ...
    @property
    def stats(self) -> SchedulerStats: ...
    @property
    def adapters(self) -> ServedAdapters: ...

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams | PoolingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        placement: Placement = Placement(),
        thinking: ThinkingTokens | None = None,
        deadline: float | None = None,
    ) -> RequestStream: ...

    def check_grammar(self, params: SamplingParams) -> Sequence[str]:
        """Compile `params.structured_outputs` once, and return warnings for the client. Raises
        `InvalidParameterError` if that fails. It may take seconds, so call it in a thread."""

    @property
    def is_dead(self) -> bool: ...

    def health(self, timeout: float) -> Health: ...

    def add_stats_listener(self, callback: Callable[[StepOutputs], None]) -> None: ...

    def attach_metrics(self, metrics: MetricsSink, *, log_prefixes: bool = False) -> None: ...

    async def reset_prefix_cache(self) -> bool: ...

    async def shutdown(self) -> None: ...


@runtime_checkable
class RecordingEngine(Protocol):
    """An engine that records its decisions."""

    async def records(self) -> list[bytes]:
        """Of each core that does, for `quire.scheduler.record_reader`."""
        ...


@runtime_checkable
class SleepingEngine(Protocol):
    """An engine that can free its memory and allocate it again."""

    async def sleep(self, level: int = 1) -> None: ...

    async def wake_up(self) -> None: ...

    @property
    def is_sleeping(self) -> bool: ...
