"""Counting tokens of one HTTP request, which may be several engine requests."""

from __future__ import annotations

from msgspec import UNSET

from quire.outputs import RequestOutput, RequestSpecDecodeMetrics
from quire.server.wire import CompletionTokensDetails, Metrics, PromptTokensDetails, Usage


class UsageMeter:
    """A prompt counts once, however many sequences are sampled from it, as in OpenAI's billing."""

    def __init__(self, drafts: str = "none") -> None:
        """drafts: as in `ServerConfig.per_request_spec_decode_metrics`."""
        self._level = drafts
        self._drafts: list[RequestSpecDecodeMetrics] = []
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
        found = [part.spec_decode_metrics for part in output.outputs]
        self._drafts += [drafts for drafts in found if drafts is not None]

    def metrics(self) -> Metrics:
        """Of an answer with one sequence, as in vLLM."""
        if self._level == "none" or len(self._drafts) != 1:
            return UNSET
        return {"speculative_decoding": self._drafts[0].to_dict(detailed=self._level == "detailed")}

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
