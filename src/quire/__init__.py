"""Quire serves large language models: a paged KV cache, continuous batching, shared prefixes.

    from quire import LLM, SamplingParams

    with LLM() as llm:
        [output] = llm.generate(["What does os.path.join do?"], SamplingParams(max_tokens=64))
        print(output.outputs[0].text)

Names are imported when they are first used, so that `import quire` costs nothing and `quire --help` does
not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from quire.util.version import VERSION as __version__

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` below
    from quire.config import EngineConfig
    from quire.engine.async_llm import AsyncLLM
    from quire.engine.beam_search import BeamSearchOutput, BeamSearchSequence
    from quire.engine.llm import LLM
    from quire.errors import (
        CheckpointError,
        ConfigError,
        EngineDeadError,
        EngineError,
        EngineSleepingError,
        InvalidParameterError,
        MemoryFitError,
        ModelError,
        ModelNotFoundError,
        PoisonRequestError,
        PromptTooLongError,
        QueueFullError,
        QuireError,
        RequestError,
        UnsupportedModelError,
        WorkerError,
    )
    from quire.lora.request import LoRARequest
    from quire.outputs import (
        CompletionOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringRequestOutput,
    )
    from quire.sampling_params import (
        BeamSearchParams,
        PoolingParams,
        RepetitionDetectionParams,
        SamplingParams,
        StructuredOutputsParams,
    )

_HOMES = {
    "LLM": "quire.engine.llm",
    "AsyncLLM": "quire.engine.async_llm",
    "EngineConfig": "quire.config",
    "LoRARequest": "quire.lora.request",
    "BeamSearchOutput": "quire.engine.beam_search",
    "BeamSearchSequence": "quire.engine.beam_search",
}
_HOMES |= dict.fromkeys(
    (
        "SamplingParams",
        "BeamSearchParams",
        "PoolingParams",
        "StructuredOutputsParams",
        "RepetitionDetectionParams",
    ),
    "quire.sampling_params",
)
_HOMES |= dict.fromkeys(
    (
        "RequestOutput",
        "CompletionOutput",
        "EmbeddingRequestOutput",
        "PoolingRequestOutput",
        "ScoringRequestOutput",
    ),
    "quire.outputs",
)
_HOMES |= dict.fromkeys(
    (
        "QuireError",
        "ConfigError",
        "ModelError",
        "UnsupportedModelError",
        "CheckpointError",
        "MemoryFitError",
        "RequestError",
        "InvalidParameterError",
        "PromptTooLongError",
        "ModelNotFoundError",
        "PoisonRequestError",
        "QueueFullError",
        "EngineError",
        "EngineSleepingError",
        "EngineDeadError",
        "WorkerError",
    ),
    "quire.errors",
)

__all__ = [
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "BeamSearchParams",
    "PoolingParams",
    "StructuredOutputsParams",
    "RepetitionDetectionParams",
    "LoRARequest",
    "RequestOutput",
    "CompletionOutput",
    "BeamSearchOutput",
    "BeamSearchSequence",
    "EmbeddingRequestOutput",
    "PoolingRequestOutput",
    "ScoringRequestOutput",
    "EngineConfig",
    "QuireError",
    "ConfigError",
    "ModelError",
    "UnsupportedModelError",
    "CheckpointError",
    "MemoryFitError",
    "RequestError",
    "InvalidParameterError",
    "PromptTooLongError",
    "ModelNotFoundError",
    "PoisonRequestError",
    "QueueFullError",
    "EngineError",
    "EngineSleepingError",
    "EngineDeadError",
    "WorkerError",
    "__version__",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
