"""The sampling parameters of a request. Names, defaults and rules follow vLLM's `SamplingParams`."""

from __future__ import annotations

import logging
import math
from enum import Enum
from typing import Any, Literal

import msgspec

from quire.errors import InvalidParameterError
from quire.limits import MAX_BAD_WORDS, MAX_N, MAX_STOP_STRINGS

logger = logging.getLogger(__name__)

GREEDY_EPSILON = 1e-5
"""Temperatures below this mean greedy decoding."""

MIN_TEMPERATURE = 0.01
"""Smaller non-greedy temperatures overflow softmax in half precision; they are raised to this."""

MAX_STOP_STRING_CHARS = 4096
MAX_STOP_TOKEN_IDS = 1024
MAX_INT = 2**63 - 1
MAX_LOGPROB_IDS = 128
MAX_PATTERN_SIZE = 256
MAX_LENGTH_PENALTY = 16.0


class RequestOutputKind(Enum):
    """The contents of each streamed `RequestOutput`."""

    CUMULATIVE = 0
    """All tokens so far."""
    DELTA = 1
    """Only what is new."""
    FINAL_ONLY = 2
    """One output, at the end."""


class StructuredOutputsParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The grammar that the output must match: exactly one of the first six fields."""

    json: str | dict[str, Any] | None = None
    """A JSON schema, as an object or as JSON text."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """Lark, or GBNF (llama.cpp's)."""
    json_object: bool | None = None
    """Any JSON object."""
    structural_tag: str | dict[str, Any] | None = None
    """Free text with tagged parts, each of which must match its own schema."""
    disable_any_whitespace: bool = False
    """JSON without optional whitespace."""
    disable_additional_properties: bool = False
    """Treat schemas as if they had `additionalProperties: false`."""
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in STRUCTURED_KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            _fail(
                "structured_outputs", given, f"needs exactly one of {', '.join(STRUCTURED_KINDS)}"
            )
        value = getattr(self, given[0])
        if value is False or (not isinstance(value, dict) and not value):
            _fail("structured_outputs", value, f"must not have an empty {given[0]}")
        if self.choice is not None and not all(isinstance(c, str) and c for c in self.choice):
            _fail("structured_outputs", self.choice, "must have non-empty strings as choice")


def _structured(asked: dict[str, Any]) -> StructuredOutputsParams:
    """The same from a dictionary, the form used over HTTP."""
    known = StructuredOutputsParams.__struct_fields__
    for name in asked:
        if name not in known:
            _fail("structured_outputs", name, f"may hold {', '.join(known)}")
    return StructuredOutputsParams(**asked)


STRUCTURED_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class RepetitionDetectionParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """End a request that repeats the same pattern of tokens `min_count` times in a row."""

    max_pattern_size: int = 0
    """Longest pattern, in tokens; 0 is off. [0, 256]"""
    min_pattern_size: int = 0
    """Shortest pattern; 0 means 1."""
    min_count: int = 0
    """Number of repetitions, at least 2."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_pattern_size <= self.max_pattern_size <= MAX_PATTERN_SIZE:
            _fail(
                "repetition_detection",
                (self.min_pattern_size, self.max_pattern_size),
                f"needs 0 <= min_pattern_size <= max_pattern_size <= {MAX_PATTERN_SIZE}",
            )
        if self.max_pattern_size and not 2 <= self.min_count <= MAX_INT:
            _fail("repetition_detection", self.min_count, "needs a min_count of at least 2")


class PoolingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How a prompt becomes one vector; no text is generated."""

    pooling: Literal["last", "mean"] = "last"
    """The last token's hidden state, or the mean of all tokens'; after the final norm."""
    normalize: bool = True
    """Scale the vector to length 1."""
    dimensions: int | None = None
    """Keep this many numbers, before normalizing; for models that were trained for it (Matryoshka)."""
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            _fail("dimensions", self.dimensions, "must be at least 1")


class BeamSearchParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """Search for the likeliest continuations, instead of sampling. See `quire.engine.beam_search`."""

    beam_width: int
    """The number of continuations that are searched and returned."""
    max_tokens: int | None = None
    """Most tokens of a continuation; None is the rest of the context."""
    ignore_eos: bool = False
    temperature: float = 0.0
    """Above 0, each beam also considers a token that is sampled at this temperature."""
    length_penalty: float = 1.0
    """A continuation's score is its log-probability / (its length, prompt included) ** length_penalty."""
    include_stop_str_in_output: bool = False
    """Whether the text shows the end-of-sequence token."""
    structured_outputs: StructuredOutputsParams | None = None
    """Refused: beam search does not support grammars yet."""
    n: int | None = None
    """How many of the `beam_width` to return; None is all."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens", "n"):
            value = getattr(self, name)
            if value is None and name != "beam_width":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                _fail(name, value, "must be an integer of at least 1")
        if self.n is not None and self.n > self.beam_width:
            _fail("n", self.n, f"must not exceed beam_width ({self.beam_width})")
        for name, low, high in (
            ("temperature", 0.0, 2.0),
            ("length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
        ):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:  # written so that NaN fails too
                _fail(name, value, f"must be a number in [{low:g}, {high:g}]")
        if self.structured_outputs is not None:
            _fail("structured_outputs", self.structured_outputs, "does not go with beam search")


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Sampling parameters of one request.

    Raises `InvalidParameterError` (a `ValueError`) naming the field, on construction. What depends on
    the model (vocabulary, context length, `max_logprobs`) is checked when the request is submitted.
    """

    n: int = 1
    """Number of sequences to sample for the prompt; their prompt blocks are shared."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens that were generated. [-2, 2]"""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of generated tokens, once for each occurrence. [-2, 2]"""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or output. > 0"""
    temperature: float = 1.0
    """0 is greedy. [0, 2]"""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this. (0, 1]"""
    top_k: int = 0
    """Consider only the k most likely tokens, ties by lowest id; 0 or -1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one. [0, 1]"""
    seed: int | None = None
    """Seed of the request's own random stream; None (or -1) draws one."""
    stop: str | list[str] | None = None
    """Strings that end generation; not part of the text unless `include_stop_str_in_output`."""
    stop_token_ids: list[int] | None = None
    """Token ids that end generation."""
    ignore_eos: bool = False
    """Continue past the end-of-sequence token."""
    max_tokens: int | None = 16
    """Most tokens to generate; None is the rest of the context."""
    min_tokens: int = 0
    """No stop token or string applies before this many tokens."""
    logprobs: int | None = None
    """Return this many top logprobs per generated token, with the chosen one's; -1 is all."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, all but the first."""
    prompt_logprob_start: int | None = None
    """First prompt token whose logprobs are wanted; those before it may come from the prefix cache."""
    logprob_token_ids: list[int] | None = None
    """Tokens whose logprobs are returned at each generated position, whatever their rank."""
    logit_bias: dict[int, float] | None = None
    """Token id -> number added to its logit, before all other edits. Clamped to [-100, 100]."""
    allowed_token_ids: list[int] | None = None
    """Only these may be generated."""
    bad_words: list[str] | None = None
    """Texts whose tokens must not be generated in a row."""
    structured_outputs: StructuredOutputsParams | None = None
    """A grammar that the output follows."""
    thinking_token_budget: int | None = None
    """Most tokens of a reasoning model's reasoning, which is then closed."""
    repetition_detection: RepetitionDetectionParams | None = None
    detokenize: bool = True
    """Produce text, not only token ids."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    """Tokens per streamed output, at least; None is the engine's setting."""
    skip_reading_prefix_cache: bool | None = None
    """Compute the whole prompt; None: only as far as prompt_logprobs need it."""
    flat_logprobs: bool = False
    """Accepted for compatibility: logprobs are always a list of mappings."""
    extra_args: dict[str, Any] | None = None
    """`kv_transfer_params`, for prefill/decode disaggregation; other keys have no effect."""

    def __post_init__(self) -> None:
        def set_(name: str, value: object) -> None:
            msgspec.structs.force_setattr(self, name, value)

        for name in _FLOAT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                _fail(name, value, "must be a number")
            if not math.isfinite(value):
                _fail(name, value, "must be finite")
        for name in _INT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                if value is None and name in _OPTIONAL_INTS:
                    continue
                _fail(name, value, "must be an integer")
            if abs(value) > MAX_INT:
                _fail(name, value, "must fit in 64 bits")
        for name in _BOOL_FIELDS:
            if not isinstance(getattr(self, name), bool):
                _fail(name, getattr(self, name), "must be true or false")

        if self.seed == -1:
            set_("seed", None)
        if isinstance(self.stop, str):
            set_("stop", [self.stop])
        elif self.stop is not None and not self.stop:
            set_("stop", None)
        if isinstance(self.structured_outputs, dict):
            set_("structured_outputs", _structured(self.structured_outputs))
        elif not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            kind = "must be a StructuredOutputsParams or a dictionary of its fields"
            _fail("structured_outputs", self.structured_outputs, kind)
        self._check_stops()
        self._check_ranges()
        if self.temperature < GREEDY_EPSILON:
            if self.n > 1:
                _fail("n", self.n, "must be 1 with greedy sampling (temperature 0)")
            for name, neutral in (
                ("temperature", 0.0),
                ("top_p", 1.0),
                ("top_k", 0),
                ("min_p", 0.0),
            ):
                set_(name, neutral)
        elif self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %g is raised to %g", self.temperature, MIN_TEMPERATURE)
            set_("temperature", MIN_TEMPERATURE)
        if self.top_k == -1:
            set_("top_k", 0)

    def _check_ranges(self) -> None:
        if not 1 <= self.n <= MAX_N:
            _fail("n", self.n, f"must be between 1 and {MAX_N}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                _fail(name, getattr(self, name), "must be in [-2, 2]")
        if self.repetition_penalty <= 0.0:
            _fail("repetition_penalty", self.repetition_penalty, "must be greater than 0")
        if not 0.0 <= self.temperature <= 2.0:
            _fail("temperature", self.temperature, "must be in [0, 2]")
        if not 0.0 < self.top_p <= 1.0:
            _fail("top_p", self.top_p, "must be in (0, 1]")
        if self.top_k < -1:
            _fail("top_k", self.top_k, "must be positive, or 0 or -1 to turn it off")
        if not 0.0 <= self.min_p <= 1.0:
            _fail("min_p", self.min_p, "must be in [0, 1]")
        least = 1 if self.prompt_logprobs is None else 0  # 0: only score the prompt
        if self.max_tokens is not None and self.max_tokens < least:
            _fail("max_tokens", self.max_tokens, "must be at least 1")
        if self.max_tokens == 0 and self.n > 1:
            _fail("n", self.n, "must be 1 where a prompt is only scored (max_tokens 0)")
        if self.min_tokens < 0:
            _fail("min_tokens", self.min_tokens, "must be at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _fail("min_tokens", self.min_tokens, f"must not exceed max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < -1:
                _fail(name, value, "must be at least 0, or -1 for the whole vocabulary")
        for name, least in (
            ("prompt_logprob_start", 0),
            ("thinking_token_budget", 0),
            ("stream_interval", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                _fail(name, value, f"must be at least {least}")
        self._check_token_rules()

    def _check_token_rules(self) -> None:
        if self.logit_bias is not None:
            clamped = {}
            for token, bias in self.logit_bias.items():
                _check_id("logit_bias", token)
                if isinstance(bias, bool) or not isinstance(bias, (int, float)) or bias != bias:
                    _fail("logit_bias", bias, "must map token ids to numbers")
                clamped[token] = float(min(100, max(-100, bias)))
            msgspec.structs.force_setattr(self, "logit_bias", clamped or None)
        for name, most in (("allowed_token_ids", None), ("logprob_token_ids", MAX_LOGPROB_IDS)):
            ids = getattr(self, name)
            if ids is None:
                continue
            if not isinstance(ids, list) or not ids:
                _fail(name, ids, "must be a list of at least one token id")
            if most is not None and len(ids) > most:
                _fail(name, len(ids), f"must hold at most {most} token ids")
            for token in ids:
                _check_id(name, token)
        if self.bad_words is not None:
            if len(self.bad_words) > MAX_BAD_WORDS:
                _fail("bad_words", len(self.bad_words), f"must hold at most {MAX_BAD_WORDS} texts")
            for word in self.bad_words:
                if not isinstance(word, str) or not word or len(word) > MAX_STOP_STRING_CHARS:
                    _fail("bad_words", word, "must hold non-empty strings")
            if not self.bad_words:
                msgspec.structs.force_setattr(self, "bad_words", None)

    def _check_stops(self) -> None:
        stops = self.stop if isinstance(self.stop, list) else []
        if len(stops) > MAX_STOP_STRINGS:
            _fail("stop", len(stops), f"must hold at most {MAX_STOP_STRINGS} strings")
        for text in stops:
            if not isinstance(text, str) or not text:
                _fail("stop", text, "must hold non-empty strings")
            if len(text) > MAX_STOP_STRING_CHARS:
                _fail("stop", len(text), f"strings must be at most {MAX_STOP_STRING_CHARS} chars")
        if stops and not self.detokenize:
            _fail("stop", stops, "needs detokenize=True: stop strings are found in the text")
        ids = self.stop_token_ids
        if ids is None:
            return
        if not isinstance(ids, list) or len(ids) > MAX_STOP_TOKEN_IDS:
            _fail(
                "stop_token_ids", ids, f"must be a list of at most {MAX_STOP_TOKEN_IDS} token ids"
            )
        for token in ids:
            _check_id("stop_token_ids", token)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list, empty when there is none."""
        return self.stop if isinstance(self.stop, list) else []

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def replace(self, **changes: object) -> SamplingParams:
        """A copy with `changes`, validated again."""
        return msgspec.structs.replace(self, **changes)  # type: ignore[arg-type]


_FLOAT_FIELDS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p",
)  # fmt: skip
_OPTIONAL_INTS = frozenset(
    {
        "seed", "max_tokens", "logprobs", "prompt_logprobs", "prompt_logprob_start",
        "thinking_token_budget", "stream_interval",
    }
)  # fmt: skip
_INT_FIELDS = ("n", "top_k", "min_tokens", *sorted(_OPTIONAL_INTS))
_BOOL_FIELDS = (
    "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip


def _check_id(param: str, token: object) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or token < 0:
        _fail(param, token, "must hold non-negative token ids")


def _fail(param: str, value: object, rule: str) -> None:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    raise InvalidParameterError(f"{param} {rule}, got {shown}.", param=param, value=value)
