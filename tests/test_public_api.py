"""What `import quire` promises: these names, and nothing heavy until one is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quire

SOURCE = Path(quire.__file__).parents[1]

PUBLIC = {
    "LLM": "quire.engine.llm",
    "AsyncLLM": "quire.engine.async_llm",
    "SamplingParams": "quire.sampling_params",
    "BeamSearchParams": "quire.sampling_params",
    "PoolingParams": "quire.sampling_params",
    "StructuredOutputsParams": "quire.sampling_params",
    "RepetitionDetectionParams": "quire.sampling_params",
    "LoRARequest": "quire.lora.request",
    "RequestOutput": "quire.outputs",
    "CompletionOutput": "quire.outputs",
    "BeamSearchOutput": "quire.engine.beam_search",
    "BeamSearchSequence": "quire.engine.beam_search",
    "EmbeddingRequestOutput": "quire.outputs",
    "PoolingRequestOutput": "quire.outputs",
    "ScoringRequestOutput": "quire.outputs",
    "EngineConfig": "quire.config.engine",
    "QuireError": "quire.errors",
    "ConfigError": "quire.errors",
    "ModelError": "quire.errors",
    "UnsupportedModelError": "quire.errors",
    "CheckpointError": "quire.errors",
    "MemoryFitError": "quire.errors",
    "RequestError": "quire.errors",
    "InvalidParameterError": "quire.errors",
    "PromptTooLongError": "quire.errors",
    "ModelNotFoundError": "quire.errors",
    "PoisonRequestError": "quire.errors",
    "QueueFullError": "quire.errors",
    "EngineError": "quire.errors",
    "EngineSleepingError": "quire.errors",
    "EngineDeadError": "quire.errors",
    "WorkerError": "quire.errors",
}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    ).stdout


def test_the_names_are_exactly_these() -> None:
    assert set(quire.__all__) == {*PUBLIC, "__version__"}
    assert set(dir(quire)) == {*PUBLIC, "__version__"}


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_is_there(name: str) -> None:
    value = getattr(quire, name)
    assert value.__module__ == PUBLIC[name]
    assert value.__name__ == name
    assert value.__doc__


def test_every_error_is_public() -> None:
    from quire import errors

    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.QuireError)
    }
    assert classes == {name for name, home in PUBLIC.items() if home == "quire.errors"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = quire.Llm


def test_the_version_is_one_string() -> None:
    assert quire.__version__.startswith("0.1.0")


def test_import_is_torch_free() -> None:
    loaded = run_python("import sys, quire; print(*sys.modules)").split()
    assert not {"torch", "numpy", "msgspec", "fastapi", "tokenizers"} & set(loaded)
