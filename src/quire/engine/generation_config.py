"""Default sampling parameters: generation_config.json, and the operator's overrides.

The fields are vLLM's. `do_sample` is not read, as in vLLM: the temperature decides whether a request
samples. An invalid value is a mistake of the file and not of the client, so it is dropped at the start
with a warning; in an option it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quire.config import ModelConfig
from quire.engine.end_tokens import EosSource
from quire.errors import ConfigError, InvalidParameterError
from quire.sampling_params import SamplingParams
from quire.weights.safetensors import GENERATION_CONFIG, read_json
from quire.weights.source import ModelSource

OVERRIDE = "override_generation_config"
FILE = GENERATION_CONFIG
PARAMETERS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Field of the file -> field of `SamplingParams`."""
INTEGERS = ("top_k", "max_new_tokens")


def read_generation_config(model: ModelConfig, source: ModelSource) -> dict[str, object]:
    """The fields of the model's file, or of the file that the operator names."""
    if model.generation_config in ("auto", "vllm"):
        return source.generation_config()
    path = Path(model.generation_config) / FILE
    if not path.is_file():
        raise ConfigError(f"generation_config: no {FILE} in {path.parent}.")
    return read_json(path)


def sampling_defaults(
    model: ModelConfig, generation: Mapping[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Fields of `SamplingParams` for requests that do not set them, and a warning for each that was dropped.

    Raises `ConfigError` for a value of `override_generation_config` that no request may have.
    """
    defaults: dict[str, object] = {}
    warnings = []
    override = model.override_generation_config
    for name, parameter in PARAMETERS.items():
        value = override.get(name)
        if name in override:
            if value is not None and (problem := _problem(name, parameter, value)):
                raise ConfigError(f"{OVERRIDE}: {problem}")
        elif model.generation_config != "vllm":
            value = generation.get(name)
            if value is not None and (problem := _problem(name, parameter, value)):
                warnings.append(f"{FILE}: {problem} It is ignored.")
                continue
        if value is not None:
            defaults[parameter] = _number(name, value)
    return defaults, warnings


def eos_sources(
    model: ModelConfig, config: Mapping[str, object], generation: Mapping[str, object]
) -> tuple[EosSource, ...]:
    """The end tokens of each file. If the operator sets them, only those count."""
    wanted = model.override_generation_config.get("eos_token_id")
    if wanted is not None:
        return (EosSource(OVERRIDE, wanted),)
    return (
        EosSource(FILE, generation.get("eos_token_id")),
        EosSource("config.json", config.get("eos_token_id")),
    )


def _problem(name: str, parameter: str, value: object) -> str | None:
    try:
        SamplingParams(**{parameter: _number(name, value)})  # type: ignore[arg-type]
    except InvalidParameterError as error:
        return f"{name} is {value!r:.80}: {error}"
    return None


def _number(name: str, value: object) -> object:
    """A number; some files write integers with a decimal point."""
    if name in INTEGERS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
