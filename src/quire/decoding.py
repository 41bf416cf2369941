"""How the engine computes one request: ids and numbers, resolved once when the request is submitted.

`engine/input_processor.py` makes a `Decoding` from the caller's parameters, the model's end tokens and the
context's length. Scheduler, runner and sampler read it and derive nothing themselves. Stop strings, schemas
and other texts stay in the front end.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from quire.sampling_params import PoolingParams, RepetitionDetectionParams

MAX_TOP_K = 2**31 - 1


class Task(str, Enum):
    """The purpose of a request."""

    GENERATE = "generate"
    """It generates tokens."""
    SCORE = "score"
    """It returns the logprobs of its prompt, and generates no token."""
    EMBED = "embed"
    """It returns one vector for its prompt, see `Decoding.pooling`."""


class GrammarSpec(msgspec.Struct, frozen=True):
    """A grammar that the front end has compiled once, so that it is known to compile."""

    kind: str
    """The format of the text: "json_schema" or "lark" (other forms are converted to one of them)."""
    text: str


class TokenRules(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The rules for the next token that depend on the tokens before it."""

    bad_words: list[list[int]] = []
    """Sequences that must not occur."""
    grammar: GrammarSpec | None = None
    think_end: list[int] = []
    """Tokens that end a reasoning model's reasoning. If the output begins inside the reasoning
    (`thinking`), the grammar applies after them."""
    think_start: list[int] = []
    thinking: bool = False
    """Whether the prompt ends inside the reasoning."""
    thinking_budget: int | None = None


class Decoding(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How one sequence is computed. Token ids are within the model's vocabulary.

    A field with the name of one of `SamplingParams` has the same meaning; if other parameters disable it,
    it has its neutral value.
    """

    task: Task = Task.GENERATE
    max_tokens: int = 1
    """Most tokens to generate, within the context; 0 if the task is not to generate."""
    min_tokens: int = 0
    """No token may end the sequence before this many. 0 with a grammar, which determines where it may end."""
    end_token_ids: frozenset[int] = frozenset()
    """The model's end tokens; none if they are ignored (which a grammar rules out)."""
    stop_token_ids: frozenset[int] = frozenset()
    """The request's own end tokens; the one that ended it is reported."""
    repetition_detection: RepetitionDetectionParams | None = None

    seed: int = 0
    """Key of the random stream: 64 bits, as a signed integer."""
    temperature: float = 0.0
    """0 is greedy; filters are then off."""
    top_p: float = 1.0
    top_k: int = 0
    """At most `MAX_TOP_K`."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    rules: TokenRules | None = None

    logprobs: int | None = None
    """Number of top logprobs for each generated token, -1 for all, None for no logprobs. 0 if only those of
    `logprob_token_ids` are wanted."""
    logprob_token_ids: list[int] = []
    prompt_logprobs: int | None = None
    first_prompt_logprob: int = 1
    """Index in the prompt of the first token whose logprobs are wanted, if any are."""
    pooling: PoolingParams | None = None
    """Set exactly if the task is `Task.EMBED`."""
    reads_prefix_cache: bool = True

    @property
    def generates(self) -> bool:
        return self.task is Task.GENERATE

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether a filter removes tokens before sampling."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def restricts_tokens(self) -> bool:
        """Whether a mask restricts the next token."""
        return self.rules is not None or self.allowed_token_ids is not None

    @property
    def edits_logits(self) -> bool:
        """Whether logits are edited before every token. A ban on end tokens applies only at the
        beginning, see `banned_until`."""
        return self.has_penalties or bool(self.logit_bias) or self.restricts_tokens

    @property
    def grammar(self) -> GrammarSpec | None:
        return None if self.rules is None else self.rules.grammar

    @property
    def final_ids(self) -> list[int]:
        """Every token that ends the sequence, ascending."""
        return sorted(self.end_token_ids | self.stop_token_ids)

    def banned_until(self, num_prompt_tokens: int) -> int:
        """A token sampled at an index in the request below this may not be one of `final_ids`."""
        if not self.min_tokens or not (self.end_token_ids or self.stop_token_ids):
            return 0
        return num_prompt_tokens + self.min_tokens


def signed_64(number: int) -> int:
    """The same 64 bits as a signed integer. number: in [-2**63, 2**64)."""
    return number if number < 2**63 else number - 2**64
