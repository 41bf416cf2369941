"""Reads the arguments of `LLM`'s methods, and makes their results from `RequestOutput`s. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import mul
from typing import TypeVar

from quire.engine.beam_search import BeamSearchOutput, BeamSearchSequence
from quire.engine.input_processor import PromptInput
from quire.errors import EngineError, InvalidParameterError
from quire.lora.request import LoRARequest
from quire.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from quire.text.tokenizer import Tokenizer

Message = Mapping[str, object]
Params = TypeVar("Params")

# --- arguments ------------------------------------------------------------------------------------


def as_batch(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    """A lone prompt becomes a batch of one. A sequence of ints is a prompt, of anything else a batch."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InvalidParameterError(
            "prompts must be text, token ids, a mapping with one of these, or a list of such prompts, "
            f"got {type(prompts).__name__}.",
            param="prompts",
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    """A lone conversation becomes a list of one."""
    if isinstance(messages, str) or (messages and isinstance(messages[0], (str, Mapping))):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]


def as_pairs(
    data_1: str | Sequence[str], data_2: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """The texts of each side; a single text on the left is paired with all on the right."""
    lefts = [data_1] if isinstance(data_1, str) else list(data_1)
    rights = [data_2] if isinstance(data_2, str) else list(data_2)
    if len(lefts) not in (1, len(rights)):
        raise InvalidParameterError(
            f"data_1 and data_2 must be 1:1, 1:N or N:N, got {len(lefts)}:{len(rights)}.",
            param="data_2",
        )
    return lefts, rights


def for_each(
    params: Params | Sequence[Params], count: int, kind: type[Params], name: str
) -> Sequence[Params]:
    """One object of `kind` per prompt. name: of the argument."""
    if isinstance(params, kind):
        return [params] * count
    if isinstance(params, (str, Mapping)) or not isinstance(params, Sequence):
        raise InvalidParameterError(
            f"{name} must be {kind.__name__}(...) or a list of them, got {type(params).__name__}.",
            param=name,
        )
    if len(params) != count:
        raise InvalidParameterError(
            f"{name} has {len(params)} entries for {count} prompts; "
            "pass one for all, or one per prompt.",
            param=name,
        )
    return params


def wants_special_tokens(tokenization: Mapping[str, object]) -> bool:
    """`add_special_tokens` in `tokenization_kwargs`."""
    if tokenization.keys() - {"add_special_tokens"}:
        raise InvalidParameterError(
            f"tokenization_kwargs may hold add_special_tokens, got {sorted(tokenization)}.",
            param="tokenization_kwargs",
        )
    return tokenization.get("add_special_tokens", True) is not False


def lora_for_each(
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None, count: int
) -> Sequence[LoRARequest | None]:
    """The adapter of each prompt."""
    if lora_request is None or isinstance(lora_request, LoRARequest):
        return [lora_request] * count
    if isinstance(lora_request, str) or len(lora_request) != count:
        raise InvalidParameterError(
            f"lora_request must be one LoRARequest for all prompts, or a list of {count} (or None).",
            param="lora_request",
        )
    for each in lora_request:
        if each is not None and not isinstance(each, LoRARequest):
            raise InvalidParameterError(
                f"lora_request must hold LoRARequest(...) or None, got {type(each).__name__}.",
                param="lora_request",
            )
    return lora_request


# --- results --------------------------------------------------------------------------------------


def as_embedding(output: RequestOutput) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(
        output.request_id,
        EmbeddingOutput(_vector(output)),
        output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
    )


def as_pooling(output: RequestOutput) -> PoolingRequestOutput:
    return PoolingRequestOutput(
        output.request_id,
        PoolingOutput(_vector(output)),
        output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
    )


def as_scores(
    lefts: Sequence[RequestOutput], rights: Sequence[RequestOutput]
) -> list[ScoringRequestOutput]:
    """The cosine of each pair of vectors, which have length 1."""
    pairs = zip(lefts if len(lefts) > 1 else [*lefts] * len(rights), rights, strict=True)
    return [
        ScoringRequestOutput(
            right.request_id,
            ScoringOutput(max(-1.0, min(1.0, sum(map(mul, _vector(left), _vector(right)))))),
            [*left.prompt_token_ids, *right.prompt_token_ids],
            num_cached_tokens=(left.num_cached_tokens or 0) + (right.num_cached_tokens or 0),
        )
        for left, right in pairs
    ]


def _vector(output: RequestOutput) -> list[float]:
    if output.embedding is None:
        raise EngineError(output.error or "The request ended without a vector.")
    return output.embedding


def as_beams(output: RequestOutput, tokenizer: Tokenizer) -> BeamSearchOutput:
    """The result of a beam search in vLLM's offline form, where text and tokens begin with the prompt."""
    if output.error is not None:
        raise EngineError(output.error)
    return BeamSearchOutput(
        [_as_beam(output.prompt_token_ids, beam, tokenizer) for beam in output.outputs]
    )


def _as_beam(
    prompt_token_ids: Sequence[int], beam: CompletionOutput, tokenizer: Tokenizer
) -> BeamSearchSequence:
    tokens = [*prompt_token_ids, *beam.token_ids]
    return BeamSearchSequence(
        tokens,
        beam.logprobs or [],
        beam.cumulative_logprob or 0.0,
        text=tokenizer.decode(tokens, skip_special_tokens=False),
        finish_reason="stop" if beam.finish_reason == "stop" else None,
        stop_reason=beam.stop_reason,
    )
