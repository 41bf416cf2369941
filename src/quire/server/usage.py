"""Counting tokens of one HTTP request, which may be several engine requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import UNSET

from quire.outputs import RequestOutput, RequestSpecDecodeMetrics
from quire.prefix_report import PrefixReport
from quire.server.wire import (
    CompletionTokensDetails,
    KVParams,
    Metrics,
    PrefixDetails,
    PromptTokensDetails,
    Usage,
)


class Choice(Protocol):
    @property
    def finish_reason(self) -> str | None: ...


class UsageMeter:
    """A prompt counts once, however many sequences are sampled from it, as in OpenAI's billing."""

    def __init__(self, drafts: str = "none", *, prefixes: bool | None = False) -> None:
        """drafts: as in `ServerConfig.per_request_spec_decode_metrics`. prefixes: whether usage has what
        `return_prefix_details` asks for."""
        self._level = drafts
        self._shows_prefixes = prefixes
        self._drafts: list[RequestSpecDecodeMetrics] = []
        self._prompts: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._prefixes: dict[int, PrefixDetails] = {}
        self._completion = 0
        self.reasoning_tokens: int | None = None
        """The reasoning tokens of the completion, if known."""
        self._handed: KVParams = UNSET

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Count an output that holds only what is new."""
        self._prompts[prompt_index] = len(output.prompt_token_ids)
        if output.num_cached_tokens is not None:
            self._cached[prompt_index] = output.num_cached_tokens
        if output.prefix is not None and self._shows_prefixes:
            self._prefixes[prompt_index] = prefix_details(output.prefix)
        if output.kv_transfer_params is not None:
            self._handed = output.kv_transfer_params
        self._completion += sum(len(part.token_ids) for part in output.outputs)
        found = [part.spec_decode_metrics for part in output.outputs]
        self._drafts += [drafts for drafts in found if drafts is not None]

    def handed(self, choices: Sequence[Choice]) -> KVParams:
        """`kv_transfer_params` of an answer or chunk: they come with a finish reason."""
        return self._handed if choices and choices[-1].finish_reason else UNSET

    def handed_on(self) -> dict[str, object]:
        """The same for answers that are dictionaries."""
        return {} if self._handed is UNSET else {"kv_transfer_params": self._handed}

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
            PromptTokensDetails(
                sum(self._cached.values()),
                [self._prefixes[index] for index in sorted(self._prefixes)]
                if self._shows_prefixes
                else UNSET,
            ),
            UNSET
            if self.reasoning_tokens is None
            else CompletionTokensDetails(self.reasoning_tokens),
        )


def prefix_details(report: PrefixReport) -> PrefixDetails:
    """What a client may know: nothing of what others have asked under another salt."""
    report = report.for_client()
    return PrefixDetails(
        device=report.device,
        ram=report.ram,
        disk=report.disk,
        peer=report.peer,
        computed=report.computed,
        reason=report.reason.value,
        seconds_ago=round(report.seconds_ago, 3) if report.since_step else UNSET,
    )
