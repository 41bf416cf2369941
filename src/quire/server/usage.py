"""Counting tokens of one HTTP request, which may be several engine requests."""

from __future__ import annotations

from msgspec import UNSET

from quire.outputs import RequestOutput
from quire.server.wire import CompletionTokensDetails, PromptTokensDetails, Usage


class UsageMeter:
    """A prompt counts once, however many sequences are sampled from it, as in OpenAI's billing."""

    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._completion = 0
        self.reasoning_tokens: int | None = None
        """The reasoning tokens of the completion, if known."""

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Count an output that holds only what is new."""
        self._prompts[prompt_index] = len(output.prompt_token_ids)
        if output.num_cached_tokens is not None:
            self._cached[prompt_index] = output.num_cached_tokens
        self._completion += sum(len(part.token_ids) for part in output.outputs)

    def usage(self) -> Usage:
        prompt = sum(self._prompts.values())
        return Usage(
            prompt,
            self._completion,
            prompt + self._completion,
            PromptTokensDetails(sum(self._cached.values())),
            UNSET
            if self.reasoning_tokens is None
            else CompletionTokensDetails(self.reasoning_tokens),
        )
