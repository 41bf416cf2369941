"""From what a caller passed to `AddRequest`s that are certain to be servable. Every front end comes
through here, so no route can miss a check."""

from __future__ import annotations

import hashlib
import itertools
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from quire.engine.setup import ServedModel
from quire.errors import InvalidParameterError, PromptTooLongError
from quire.messages import AddRequest, TokenRules
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.structured.spec import Wanted, wanted
from quire.text.parsing.base import ThinkingTokens

PromptInput = str | Sequence[int] | Mapping[str, object]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`, and `cache_salt` if wanted."""

MAX_CACHE_SALT_CHARS = 1024
NUM_GRAMMARS = 32
"""Grammars kept, least recently used out first."""
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt"})


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request of a caller: `n` sequences over one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    """Of a request that is pooled, only a placeholder."""
    max_tokens: int
    arrival_ts: float
    sequences: list[AddRequest]
    search: BeamSearchParams | None = None
    """Set by the front end for a beam search, whose sequences are not sent."""


class InputProcessor:
    """Tokenizes and validates. Raises `RequestError`s only."""

    def __init__(self, model: ServedModel, *, has_head: bool = True) -> None:
        """has_head: False for a model that gives vectors and no text."""
        self._model = model
        self._has_head = has_head
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._grammars: dict[bytes, Wanted] = {}
        tokenizer = model.tokenizer
        self._special = {
            text: token
            for token in sorted(tokenizer.special_ids)
            if (text := tokenizer.token_str(token))
        }

    def process(
        self,
        prompt: PromptInput,
        params: SamplingParams | PoolingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
        thinking: ThinkingTokens | None = None,
        max_logprobs: int | None = None,
        fit_max_tokens: bool = False,
    ) -> EngineRequest:
        """thinking: of a reasoning model, how it begins and ends to think.
        fit_max_tokens: max_tokens is a default, which is cut to what the context has room for.
        max_logprobs: instead of the model's limit, for requests of our own making."""
        text, token_ids, salt = self._read_prompt(prompt, cache_salt, add_special_tokens)
        pooling = params if isinstance(params, PoolingParams) else None
        if pooling is not None:
            self._check_pooling(pooling)
            params = SamplingParams()
        elif not self._has_head:
            raise InvalidParameterError(
                "This checkpoint is a base model without an output head (lm_head.weight): it gives "
                "embeddings, and generates no text.",
                param="model",
            )
        assert not isinstance(params, PoolingParams)
        limit = self._model.max_logprobs if max_logprobs is None else max_logprobs
        self._check_params(params, max_logprobs=limit)
        scores_only = pooling is not None or params.max_tokens == 0
        self._check_prompt(token_ids, most=self._model.max_model_len - (not scores_only))
        rules = self._rules(params, thinking)
        sent = params.replace(structured_outputs=None)  # the rules have the grammar
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 2**31:
            raise InvalidParameterError(
                f"priority must be a 32-bit integer, got {priority!r}.",
                param="priority", value=priority,
            )  # fmt: skip
        max_tokens = (
            0 if scores_only else self._max_tokens(len(token_ids), params, fit=fit_max_tokens)
        )
        now = time.monotonic()
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        leader = next(self._ids)
        sequences = [
            AddRequest(
                request_id=leader if index == 0 else next(self._ids),
                prompt_token_ids=token_ids,
                # Siblings differ by their seed alone; the prompt's logprobs are the first one's.
                params=sent.replace(prompt_logprobs=None) if index else sent,
                seed=(seed + index) % 2**64,
                max_tokens=max_tokens,
                rules=rules,
                pooling=pooling,
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

    def _check_prompt(self, token_ids: list[int], *, most: int) -> None:
        if not token_ids:
            raise InvalidParameterError(
                "The prompt is empty; it needs at least one token.", param="prompt"
            )
        limit = self._model.max_model_len
        if len(token_ids) > most:
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

    def _check_params(self, params: SamplingParams, *, max_logprobs: int) -> None:
        if not isinstance(params, SamplingParams):
            raise InvalidParameterError(
                f"sampling_params must be SamplingParams, got {type(params).__name__}.",
                param="sampling_params",
            )
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and max_logprobs >= 0 and not 0 <= asked <= max_logprobs:
                raise InvalidParameterError(
                    f"{name} asks for {'all' if asked == -1 else asked} alternatives; this server "
                    f"allows {max_logprobs} (--max-logprobs).",
                    param=name,
                    value=asked,
                )
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
            self._check_ids(getattr(params, name) or (), name)

    def _check_pooling(self, pooling: PoolingParams) -> None:
        size = self._model.spec.hidden_size
        if pooling.dimensions is not None and pooling.dimensions > size:
            raise InvalidParameterError(
                f"dimensions is {pooling.dimensions}; this model's vectors have {size}.",
                param="dimensions",
                value=pooling.dimensions,
            )

    def _rules(self, params: SamplingParams, thinking: ThinkingTokens | None) -> TokenRules | None:
        """What restricts the next token by those before it; None if nothing does."""
        if params.thinking_token_budget is not None and thinking is None:
            raise InvalidParameterError(
                "thinking_token_budget needs a reasoning model (--reasoning-parser).",
                param="thinking_token_budget",
                value=params.thinking_token_budget,
            )
        structured = params.structured_outputs
        if not params.bad_words and structured is None and params.thinking_token_budget is None:
            return None
        grammar = self.grammar(params)
        bad_words = [ids for word in params.bad_words or () for ids in self._spellings(word)]
        self._check_ids([token for ids in bad_words for token in ids], "bad_words")
        return TokenRules(
            bad_words=bad_words,
            grammar=grammar.spec if grammar is not None else None,
            think_start=thinking.start if thinking else [],
            think_end=thinking.end if thinking else [],
            thinking=thinking.inside if thinking else False,
            thinking_budget=params.thinking_token_budget,
        )

    def grammar(self, params: SamplingParams) -> Wanted | None:
        """What `params` ask for, as a grammar. From any thread.

        Preparing the schemas of a hundred tools takes 0.1 s and is asked for twice per request (to check it
        beforehand), and again with every turn of a conversation: so the last ones are kept.

        Raises `InvalidParameterError` for one that cannot be meant; compiling it is another matter.
        """
        asked = params.structured_outputs
        if asked is None:
            return None
        try:
            key = hashlib.sha256(msgspec.json.encode(asked)).digest()
        except (TypeError, ValueError, OverflowError, RecursionError):
            key = None  # in a schema there may be anything
        with self._lock:
            found = self._grammars.get(key) if key is not None else None
        if found is None:
            found = wanted(asked, special_tokens=self._special, limits=self._model.grammars)
        if key is not None:
            with self._lock:
                self._grammars.pop(key, None)
                self._grammars[key] = found
                if len(self._grammars) > NUM_GRAMMARS:
                    del self._grammars[next(iter(self._grammars))]
        return found

    def _spellings(self, word: str) -> list[list[int]]:
        """The tokens of a text as they are at the start of a line, and after a space."""
        bare = self._model.tokenizer.encode(word, add_special_tokens=False)
        spaced = self._model.tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        return [ids for ids in ([bare] if bare == spaced else [bare, spaced]) if ids]

    def _max_tokens(self, prompt_len: int, params: SamplingParams, *, fit: bool) -> int:
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
            if fit:
                return room
            raise PromptTooLongError(
                f"This model's maximum context length is {self._model.max_model_len} tokens. "
                f"However, you requested {params.max_tokens} output tokens and your prompt contains "
                f"{prompt_len} input tokens, {prompt_len + params.max_tokens} in all. Reduce "
                "max_tokens or shorten the prompt.",
                param="max_tokens",
                value=params.max_tokens,
            )
        return params.max_tokens
