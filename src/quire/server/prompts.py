"""From completion prompts and chat messages to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from quire.placement import Retain
from quire.server.billing_header import without_header_messages
from quire.server.engine_protocol import ServedModel, ServedTokenizer
from quire.server.errors import bad_request, malformed
from quire.server.requests import ChatFields
from quire.text.parsing import ThinkingTokens

INLINE_CHARS = 16_384
"""Longer texts are tokenized in a thread (the library releases the GIL), so that a long prompt does not
delay all streams. A shorter text takes less time than a change of threads."""

RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "chat_template", "tokenize", "self",
    }
)  # fmt: skip
"""Arguments of `render` itself; `ChatTemplate` checks the rest."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """How a prompt that is too long is cut, if the client asks for it."""

    to: int | None = None
    side: Literal["left", "right"] = "left"

    def apply(self, ids: list[int]) -> list[int]:
        if self.to is None or len(ids) <= self.to:
            return ids
        return ids[-self.to :] if self.side == "left" else ids[: self.to]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    token_ids: list[int]
    text: str | None
    """As sent; None if the client sent ids."""
    thinking: ThinkingTokens | None = None
    """For a reasoning model's chat: its markers, and whether the prompt ends between them."""
    retain: tuple[Retain, ...] = ()
    """What is to stay in the cache because the client has marked it."""


def truncation(
    limit: int | None, side: Literal["left", "right"] | None, model: ServedModel
) -> Truncation:
    """-1 means the context length. Raises a 400 for 0 and for more than the context."""
    if limit is None:
        return Truncation()
    if limit == -1:
        limit = model.max_model_len
    if not 1 <= limit <= model.max_model_len:
        raise bad_request(
            f"truncate_prompt_tokens must be between 1 and {model.max_model_len} (the model's "
            f"context length), or -1 for all of that, got {limit}.",
            param="truncate_prompt_tokens",
        )
    return Truncation(limit, side or "left")


async def encode_text(
    tokenizer: ServedTokenizer, text: str, *, add_special_tokens: bool, cut: Truncation
) -> list[int]:
    def work() -> list[int]:
        return tokenizer.encode(
            text,
            add_special_tokens=add_special_tokens,
            truncate_to=cut.to,
            truncation_side=cut.side,
        )

    return work() if len(text) <= INLINE_CHARS else await asyncio.to_thread(work)


def split_prompts(
    prompt: str | list[str] | list[int] | list[list[int]], *, limit: int, param: str = "prompt"
) -> list[str | list[int]]:
    """One entry per prompt. An empty list has no prompt; `[[]]` is one empty prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise malformed(f"{param} must not be an empty list.", param=f"body.{param}")
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    check_count(len(prompt), limit, param=param)
    return list(prompt)  # type: ignore[arg-type]


def check_count(prompts: int, limit: int, *, param: str) -> None:
    if prompts > limit:
        raise bad_request(
            f"{param} holds {prompts} prompts; this server takes at most {limit} in one request "
            "(--max-prompts-per-request).",
            param=param,
        )


async def encode_prompt(
    prompt: str | list[int],
    model: ServedModel,
    *,
    add_special_tokens: bool,
    cut: Truncation,
    param: str = "prompt",
) -> EncodedPrompt:
    """Token ids of a prompt. Raises a 400 for ids without an embedding in the model."""
    if isinstance(prompt, str):
        ids = await encode_text(
            model.tokenizer, prompt, add_special_tokens=add_special_tokens, cut=cut
        )
        return EncodedPrompt(ids, prompt)
    check_ids(prompt, model, param=param)
    return EncodedPrompt(cut.apply(prompt), None)


def check_ids(ids: Sequence[int], model: ServedModel, *, param: str) -> None:
    largest = max(ids, default=0)
    if largest >= model.vocab_size:
        raise bad_request(
            f"{param} holds token id {largest}; this model's ids are 0 to {model.vocab_size - 1}.",
            param=param,
        )


def render_chat(chat: ChatFields, model: ServedModel) -> str:
    """The prompt's text: the messages, rendered by the model's template."""
    template = model.chat_template
    if template is None:
        raise bad_request(
            f"Model {model.name} has no chat template. Start the server with --chat-template, or "
            "use /v1/completions.",
            param="messages",
        )
    add_prompt = chat.add_generation_prompt is not False
    continues = chat.continue_final_message is True
    if continues and chat.add_generation_prompt is None:
        add_prompt = False
    if continues and add_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other.",
            param="continue_final_message",
        )
    messages = [message.model_dump(exclude_none=True) for message in chat.messages]
    return template.render(
        without_header_messages(messages) or messages,
        add_generation_prompt=add_prompt,
        continue_final_message=continues,
        tools=[tool.model_dump(exclude_none=True) for tool in chat.tools] if chat.tools else None,
        documents=chat.documents or None,
        **_template_kwargs(chat),
    )


def _template_kwargs(chat: ChatFields) -> dict[str, object]:
    kwargs: dict[str, object] = dict(chat.chat_template_kwargs or {})
    for name in kwargs:
        if name in RESERVED_TEMPLATE_KWARGS:
            raise bad_request(
                f"chat_template_kwargs must not set {name}.", param="chat_template_kwargs"
            )
    if chat.reasoning_effort is not None:
        kwargs["reasoning_effort"] = chat.reasoning_effort
    return kwargs
