"""From what a caller passed to `AddRequest`s that are certain to be servable. Every front end comes
through here, so no route can miss a check."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quire.engine.setup import ServedModel
from quire.errors import InvalidParameterError, PromptTooLongError
from quire.messages import AddRequest
from quire.sampling_params import SamplingParams

PromptInput = str | Sequence[int] | Mapping[str, object]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`, and `cache_salt` if wanted."""

MAX_CACHE_SALT_CHARS = 1024
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt"})


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request of a caller: `n` sequences over one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    arrival_ts: float
    sequences: list[AddRequest]


class InputProcessor:
    """Tokenizes and validates. Raises `RequestError`s only."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._ids = itertools.count(1)

    def process(
        self,
        prompt: PromptInput,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> EngineRequest:
        text, token_ids, salt = self._read_prompt(prompt, cache_salt, add_special_tokens)
        self._check_prompt(token_ids)
        self._check_params(params)
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 2**31:
            raise InvalidParameterError(
                f"priority must be a 32-bit integer, got {priority!r}.",
                param="priority", value=priority,
            )  # fmt: skip
        max_tokens = self._max_tokens(len(token_ids), params)
        now = time.monotonic()
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        leader = next(self._ids)
        sequences = [
            AddRequest(
                request_id=leader if index == 0 else next(self._ids),
                prompt_token_ids=token_ids,
                params=params,
                # Siblings differ by their seed alone.
                seed=(seed + index) % 2**64,
                max_tokens=max_tokens,
                eos_token_ids=list(self._model.eos_token_ids),
                arrival_time=now,
                priority=priority,
                cache_salt=salt,
                fork_of=leader if index else None,
            )
            for index in range(params.n)
        ]
        return EngineRequest(
            request_id=request_id if request_id is not None else f"req-{leader}",
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=max_tokens,
            arrival_ts=now,
            sequences=sequences,
        )

    def _read_prompt(
        self, prompt: PromptInput, cache_salt: str | None, add_special_tokens: bool
    ) -> tuple[str | None, list[int], str | None]:
        text: object = None
        token_ids: object = None
        salt: object = cache_salt
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, Mapping):
            unknown = set(prompt) - _PROMPT_KEYS
            if unknown or not ("prompt" in prompt or "prompt_token_ids" in prompt):
                raise InvalidParameterError(
                    "a prompt mapping needs prompt or prompt_token_ids and may hold cache_salt; "
                    f"got {sorted(map(str, prompt))}.",
                    param="prompt",
                )
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            salt = prompt.get("cache_salt", cache_salt)
        else:
            token_ids = prompt
        if text is not None and not isinstance(text, str):
            raise InvalidParameterError("prompt must be a string.", param="prompt")
        if token_ids is None:
            assert isinstance(text, str)
            token_ids = self._model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if salt is not None and not (
            isinstance(salt, str) and 1 <= len(salt) <= MAX_CACHE_SALT_CHARS
        ):
            raise InvalidParameterError(
                f"cache_salt must be a string of 1 to {MAX_CACHE_SALT_CHARS} characters.",
                param="cache_salt",
            )
        if not isinstance(token_ids, (list, tuple)):
            raise InvalidParameterError(
                f"prompt_token_ids must be a list of token ids, got {type(token_ids).__name__}.",
                param="prompt",
            )
        return text, list(token_ids), salt

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise InvalidParameterError(
                "The prompt is empty; it needs at least one token.", param="prompt"
            )
        limit = self._model.max_model_len
        if len(token_ids) >= limit:
            raise PromptTooLongError(
                f"This model's maximum context length is {limit} tokens. However, your prompt "
                f"contains {len(token_ids)} input tokens, which exceeds this limit even without any "
                "output tokens. Shorten the prompt.",
                param="input_tokens",
                value=len(token_ids),
            )
        self._check_ids(token_ids, "prompt")

    def _check_ids(self, token_ids: Sequence[object], param: str) -> None:
        vocab_size = self._model.vocab_size
        for token in token_ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise InvalidParameterError(
                    f"{param} holds {str(token)[:40]!r}; token ids are integers from 0 to "
                    f"{vocab_size - 1} (the model's vocabulary).",
                    param=param,
                    value=token,
                )

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise InvalidParameterError(
                f"sampling_params must be SamplingParams, got {type(params).__name__}.",
                param="sampling_params",
            )
        limit, asked = self._model.max_logprobs, params.logprobs
        if asked is not None and limit >= 0 and (asked == -1 or asked > limit):
            raise InvalidParameterError(
                f"logprobs asks for {'all' if asked == -1 else asked} alternatives; this server "
                f"allows {limit} (--max-logprobs).",
                param="logprobs",
                value=asked,
            )
        if params.stop_token_ids:
            self._check_ids(params.stop_token_ids, "stop_token_ids")

    def _max_tokens(self, prompt_len: int, params: SamplingParams) -> int:
        room = self._model.max_model_len - prompt_len
        if params.max_tokens is None:
            if params.min_tokens > room:
                raise InvalidParameterError(
                    f"min_tokens is {params.min_tokens}, but only {room} tokens of context are left "
                    "after the prompt.",
                    param="min_tokens",
                    value=params.min_tokens,
                )
            return room
        if params.max_tokens > room:
            raise PromptTooLongError(
                f"This model's maximum context length is {self._model.max_model_len} tokens. "
                f"However, you requested {params.max_tokens} output tokens and your prompt contains "
                f"{prompt_len} input tokens, {prompt_len + params.max_tokens} in all. Reduce "
                "max_tokens or shorten the prompt.",
                param="max_tokens",
                value=params.max_tokens,
            )
        return params.max_tokens
