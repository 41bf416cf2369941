"""The exceptions that Quire raises on purpose, so that callers can catch them by kind.

    QuireError
    ├── ConfigError            a flag, config key or combination that cannot work
    ├── ModelError             the checkpoint cannot be served
    │   ├── UnsupportedModelError   architecture or config field we do not implement
    │   └── CheckpointError         missing, truncated or mismatched weights / tokenizer
    ├── MemoryFitError         weights + KV cache do not fit; names the options that would help
    ├── RequestError           one request is wrong; others are not affected
    │   ├── InvalidParameterError   a field's value breaks its rule
    │   ├── PromptTooLongError      prompt (plus max_tokens) exceeds the context
    │   └── ModelNotFoundError      the request names a model that is not served
    ├── QueueFullError         admission limit reached; retry later
    └── EngineError            the engine failed, not the request
        ├── EngineSleepingError     its memory is freed; wake it up first
        ├── PoisonRequestError      the engine core has died of this request, or of its like
        └── EngineDeadError         the engine core is gone; no request can be served
            └── WorkerError             because one of its ranks has died or does not answer

A `RequestError` has `param` and `value`: the wrong field and its value. Messages end with a
remedy. HTTP clients never get the text of other libraries' exceptions.
"""

from __future__ import annotations


class QuireError(Exception):
    """Base of every deliberate error."""


class ConfigError(QuireError):
    """A configuration field, or a combination of fields, that cannot work."""


class ModelError(QuireError):
    """The checkpoint cannot be served."""


class UnsupportedModelError(ModelError):
    """The model's architecture, or a field of its config, is not implemented."""


class CheckpointError(ModelError):
    """Weights or tokenizer files are missing, truncated or of the wrong shape."""


class MemoryFitError(ConfigError):
    """Weights and KV cache do not fit in the memory allowed."""


class RequestError(QuireError):
    """One request is wrong. `param` is the field's name, `value` its value."""

    def __init__(self, message: str, *, param: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.param = param
        self.value = value


class InvalidParameterError(RequestError, ValueError):
    """A request field's value breaks its rule. Also a `ValueError`, as vLLM users expect."""


class PromptTooLongError(InvalidParameterError):
    """The prompt, alone or with `max_tokens`, exceeds the model's context length."""


class ModelNotFoundError(RequestError):
    """The request names a model that this server does not serve."""


class QueueFullError(QuireError):
    """The waiting queue is at its limit. `retry_after` is a hint in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(QuireError):
    """The engine failed while serving a request that was itself correct."""


class EngineSleepingError(EngineError):
    """The engine sleeps (`LLM.sleep`, POST /sleep) and takes no requests."""


class PoisonRequestError(EngineError):
    """The engine core has died of this request, or of one with the same prompt and parameters."""

    BEGINNING = "The engine core has died of this request"
    """Of the message with which it ends, and with which its like are refused."""


class EngineDeadError(EngineError):
    """The engine core has stopped; nothing can be served until it is restarted."""

    REPLICA_LOST = "The engine core of replica"
    """Beginning of the message with which requests end whose replica has stopped; the others go on."""


class WorkerError(EngineDeadError):
    """A rank of the engine has died, or is late. The message names the rank."""
