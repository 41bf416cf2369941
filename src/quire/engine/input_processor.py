"""Turns a caller's request into `AddRequest`s that can be served. All front ends use it, so that every
request gets every check."""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from quire.decoding import MAX_TOP_K, Decoding, Task, TokenRules, signed_64
from quire.engine.handoff import read_handoff
from quire.engine.setup import ServedModel
from quire.errors import InvalidParameterError, PromptTooLongError
from quire.lora.request import LoRARequest
from quire.messages import AddRequest
from quire.placement import LONGEST_RETENTION, Placement, Retain
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.structured.base import NoTokenLeftError
from quire.structured.spec import Wanted, wanted
from quire.text.parsing.base import ThinkingTokens

logger = logging.getLogger(__name__)

Params = SamplingParams | PoolingParams | BeamSearchParams
PromptInput = str | Sequence[int] | Mapping[str, object]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`, and optionally `cache_salt` and
`retain_seconds`."""

MAX_CACHE_SALT_CHARS = 1024
NUM_GRAMMARS = 32
"""Number of grammars in the LRU cache."""
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt", "retain_seconds"})


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request of a caller: one or more sequences for one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: Params
    task: Task
    placement: Placement
    max_tokens: int
    """At most what the context has room for; 0 if the task is not to generate."""
    arrival_ts: float
    sequences: list[AddRequest]
    """For the engine core. Empty for a beam search, whose beams are separate requests."""
    lora_request: LoRARequest | None = None
    deadline: float | None = None
    """Seconds of `time.monotonic()`."""


class InputProcessor:
    """Tokenizes and validates. Raises only `RequestError`s."""

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
        params: Params,
        *,
        request_id: str | None = None,
        placement: Placement = Placement(),
        add_special_tokens: bool = True,
        thinking: ThinkingTokens | None = None,
        max_logprobs: int | None = None,
        fit_max_tokens: bool = False,
        lora_request: LoRARequest | None = None,
        deadline: float | None = None,
    ) -> EngineRequest:
        """thinking: the tokens around a reasoning model's reasoning.
        fit_max_tokens: max_tokens is a default, which is reduced to what the context has room for.
        max_logprobs: replaces the model's limit, for requests that we make ourselves."""
        text, token_ids, placement = self._read_prompt(prompt, placement, add_special_tokens)
        limit = self._model.max_logprobs if max_logprobs is None else max_logprobs
        task = self._check_params(params, max_logprobs=limit)
        generates = task is Task.GENERATE
        self._check_prompt(token_ids, most=self._model.max_model_len - generates)
        rules = self._rules(params, thinking) if isinstance(params, SamplingParams) else None
        _check_priority(placement.priority)
        max_tokens = 0
        if not isinstance(params, PoolingParams) and generates:
            max_tokens = self._max_tokens(len(token_ids), params, fit=fit_max_tokens)
        now, leader = time.monotonic(), next(self._ids)
        extra_args = params.extra_args if isinstance(params, SamplingParams) else None
        handoff = read_handoff(extra_args, self._model.kv_transfer)
        if handoff.ignored:
            logger.warning("a request's %s", handoff.ignored)
        decodings = []
        if isinstance(params, PoolingParams):
            decodings = [_pooling_decoding(params)]
        elif isinstance(params, SamplingParams):
            decodings = self._decodings(params, task, max_tokens, rules)
        return EngineRequest(
            request_id=request_id if request_id is not None else f"req-{leader}",
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            task=task,
            placement=placement,
            max_tokens=max_tokens,
            arrival_ts=now,
            sequences=[
                AddRequest(
                    request_id=next(self._ids) if index else leader,
                    prompt_token_ids=token_ids,
                    decoding=decoding,
                    placement=placement,
                    arrival_time=now,
                    fork_of=leader if index else None,
                    deadline=deadline,
                    source=None if index else handoff.source,
                    hold_kv=handoff.hold and not index,
                )
                for index, decoding in enumerate(decodings)
            ],
            lora_request=lora_request,
            deadline=deadline,
        )

    def _decodings(
        self, params: SamplingParams, task: Task, max_tokens: int, rules: TokenRules | None
    ) -> list[Decoding]:
        """The `Decoding` of each of the n sequences. They differ only in the seed; only the first has the
        prompt's logprobs."""
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        first = resolve_decoding(
            params,
            task=task,
            max_tokens=max_tokens,
            end_token_ids=self._model.eos_token_ids,
            rules=rules,
            seed=seed,
        )
        check_first_token(first, self._model.vocab_size)
        others = (
            msgspec.structs.replace(
                first, seed=signed_64((seed + index) % 2**64), prompt_logprobs=None
            )
            for index in range(1, params.n)
        )
        return [first, *others]

    def _read_prompt(
        self, prompt: PromptInput, placement: Placement, add_special_tokens: bool
    ) -> tuple[str | None, list[int], Placement]:
        text: object = None
        token_ids: object = None
        salt: object = placement.cache_salt
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, Mapping):
            unknown = set(prompt) - _PROMPT_KEYS
            if unknown or not ("prompt" in prompt or "prompt_token_ids" in prompt):
                raise InvalidParameterError(
                    "a prompt mapping needs prompt or prompt_token_ids and may hold cache_salt and "
                    "retain_seconds; "
                    f"got {sorted(map(str, prompt))}.",
                    param="prompt",
                )
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            salt = prompt.get("cache_salt", salt)
            if (seconds := prompt.get("retain_seconds")) is not None:
                retain = (*placement.retain, Retain(_check_seconds(seconds)))
                placement = msgspec.structs.replace(placement, retain=retain)
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
        if salt != placement.cache_salt:
            placement = msgspec.structs.replace(placement, cache_salt=salt)
        return text, list(token_ids), placement

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

    def _check_params(self, params: Params, *, max_logprobs: int) -> Task:
        """The checks that depend on the model. Returns the request's task."""
        if isinstance(params, PoolingParams):
            self._check_pooling(params)
            return Task.EMBED
        if not self._has_head:
            raise InvalidParameterError(
                "This checkpoint is a base model without an output head (lm_head.weight): it gives "
                "embeddings, and generates no text.",
                param="model",
            )
        if isinstance(params, BeamSearchParams):
            return Task.GENERATE
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
        return Task.SCORE if params.max_tokens == 0 else Task.GENERATE

    def _check_pooling(self, pooling: PoolingParams) -> None:
        if pooling.dimensions is None:
            return
        size = self._model.spec.hidden_size
        if pooling.dimensions > size:
            raise InvalidParameterError(
                f"dimensions is {pooling.dimensions}; this model's vectors have {size}.",
                param="dimensions",
                value=pooling.dimensions,
            )

    def _rules(self, params: SamplingParams, thinking: ThinkingTokens | None) -> TokenRules | None:
        """The rules that restrict the next token by the tokens before it; None if there are none."""
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
        """The grammar of `params`. From any thread.

        Preparing the schemas of a hundred tools takes 0.1 s. It is done twice per request (once for the
        check) and again with every turn of a conversation, so the latest grammars are cached.

        Raises `InvalidParameterError` if it is malformed. It is not compiled here.
        """
        asked = params.structured_outputs
        if asked is None:
            return None
        try:
            key = hashlib.sha256(msgspec.json.encode(asked)).digest()
        except (TypeError, ValueError, OverflowError, RecursionError):
            key = None  # a schema may hold unhashable values
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
        """The tokens of a text at the start of a line, and after a space."""
        bare = self._model.tokenizer.encode(word, add_special_tokens=False)
        spaced = self._model.tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        return [ids for ids in ([bare] if bare == spaced else [bare, spaced]) if ids]

    def _max_tokens(
        self, prompt_len: int, params: SamplingParams | BeamSearchParams, *, fit: bool
    ) -> int:
        room = self._model.max_model_len - prompt_len
        if params.max_tokens is None:
            if isinstance(params, SamplingParams) and params.min_tokens > room:
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


def _check_seconds(seconds: object) -> float:
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 < float(seconds) <= LONGEST_RETENTION:  # type: ignore[arg-type]
        raise InvalidParameterError(
            f"retain_seconds must be a number above 0, at most {LONGEST_RETENTION:.0f}, got {seconds!r}.",
            param="retain_seconds",
        )
    return float(seconds)  # type: ignore[arg-type]


def _check_priority(priority: object) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 2**31:
        raise InvalidParameterError(
            f"priority must be a 32-bit integer, got {priority!r}.",
            param="priority",
            value=priority,
        )


def resolve_decoding(
    params: SamplingParams,
    *,
    task: Task,
    max_tokens: int,
    end_token_ids: Sequence[int],
    rules: TokenRules | None,
    seed: int,
) -> Decoding:
    """Resolve the parameters into a `Decoding`. What they mean together is decided only here. Ids and lengths
    have been checked.

    end_token_ids: the model's. seed: 64 bits, signed or not.
    """
    has_grammar = rules is not None and rules.grammar is not None
    asked_ids = params.logprob_token_ids or []
    return Decoding(
        task=task,
        max_tokens=max_tokens,
        # A grammar determines where the text may end.
        min_tokens=0 if has_grammar else params.min_tokens,
        end_token_ids=frozenset(() if params.ignore_eos and not has_grammar else end_token_ids),
        stop_token_ids=frozenset(params.stop_token_ids or ()),
        repetition_detection=params.repetition_detection,
        seed=signed_64(seed),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=min(params.top_k, MAX_TOP_K),
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias or {},
        allowed_token_ids=params.allowed_token_ids,
        rules=rules,
        logprobs=0 if params.logprobs is None and asked_ids else params.logprobs,
        logprob_token_ids=asked_ids,
        prompt_logprobs=params.prompt_logprobs,
        first_prompt_logprob=max(1, params.prompt_logprob_start or 0),
        reads_prefix_cache=not params.skip_reading_prefix_cache,
    )


def check_first_token(decoding: Decoding, vocab_size: int) -> None:
    """Raises `NoTokenLeftError` if no first token is allowed, whatever the model does. (A grammar, or a limit
    of the reasoning, is known only when it is followed: `RequestRules`.)"""
    rules = decoding.rules or TokenRules()
    if not decoding.generates or rules.grammar is not None or rules.thinking_budget is not None:
        return
    allowed, bad = decoding.allowed_token_ids, {w[0] for w in rules.bad_words if len(w) == 1}
    early = set(decoding.final_ids) if decoding.min_tokens else set()
    banned = bad | early
    if len(banned) < vocab_size if allowed is None else not banned.issuperset(allowed):
        return
    asked = {"allowed_token_ids": allowed is not None, "bad_words": bad, "min_tokens": early}
    raise NoTokenLeftError([name for name, is_asked in asked.items() if is_asked])


def _pooling_decoding(params: PoolingParams) -> Decoding:
    # The cache has no hidden states, which a mean needs.
    skips = params.pooling == "mean" or params.skip_reading_prefix_cache
    return Decoding(task=Task.EMBED, max_tokens=0, pooling=params, reads_prefix_cache=not skips)
