"""The conversations, and a client that holds all of them at once and measures times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.cli.http import HttpClient
from quire.errors import EngineError

SYSTEM = (
    "You are Quire's built-in model. You answer questions about Python and Quire. "
    "You are a friendly assistant. Keep answers short."
)
"""A prefix that all conversations share, longer than a block, so that it is computed once."""

SCRIPT = (
    ("what does os.path.join do?", "show me an example"),
    ("what is PagedAttention?", "what is a block table?"),
    ("what does json.dumps do?", "show me an example"),
    ("what is continuous batching?", "what is the token budget?"),
    ("what is itertools.chain for?", "can you give an example?"),
    ("how does prefix caching work?", "how do I turn prefix caching off?"),
    ("what does str.split do?", "show me an example"),
    ("what is Quire?", "why is it called Quire?"),
)


@dataclass(slots=True)
class Turn:
    """One question and its answer. Times are `time.monotonic()` seconds."""

    question: str
    answer: str = ""
    sent: float = 0.0
    first: float = 0.0
    """When the first text arrived; 0.0 while there is none."""
    done: float = 0.0
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def tokens_per_second(self) -> float:
        """The rate after the first token."""
        seconds = self.done - self.first
        return (self.completion_tokens - 1) / seconds if seconds > 0 else 0.0


@dataclass(slots=True)
class Dialogue:
    number: int
    questions: Sequence[str]
    turns: list[Turn] = field(default_factory=list)
    finished: bool = False

    def messages(self) -> list[dict[str, str]]:
        """The conversation so far; the open question is last."""
        messages = [{"role": "system", "content": SYSTEM}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            if turn.done:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages


def script(count: int) -> list[Dialogue]:
    """`count` dialogues; beyond the script's length it repeats."""
    return [Dialogue(number + 1, SCRIPT[number % len(SCRIPT)]) for number in range(count)]


async def hold(client: HttpClient, model: str, dialogue: Dialogue, max_tokens: int) -> None:
    """Ask the questions of one dialogue in order. Raises `QuireError` if an answer does not arrive."""
    for question in dialogue.questions:
        turn = Turn(question, sent=time.monotonic())
        dialogue.turns.append(turn)
        request = {
            "model": model,
            "messages": dialogue.messages(),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async for event in client.post_events("/v1/chat/completions", request):
            _take(turn, event)
        turn.done = time.monotonic()
        if turn.finish_reason is None or turn.completion_tokens == 0:
            raise EngineError(
                f"conversation {dialogue.number} got no complete answer to {question!r}."
            )
        turn.first = turn.first or turn.done  # an answer without visible text
    dialogue.finished = True


async def hold_all(
    client: HttpClient, model: str, dialogues: Sequence[Dialogue], max_tokens: int
) -> None:
    """All dialogues at once; the first failure cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for dialogue in dialogues:
                group.create_task(hold(client, model, dialogue, max_tokens))
    except* Exception as failures:
        raise failures.exceptions[0] from None


def _take(turn: Turn, event: dict[str, object]) -> None:
    """One chunk of a chat completion stream."""
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        text = choice.get("delta", {}).get("content")
        if text:
            turn.first = turn.first or time.monotonic()
            turn.answer += text
        turn.finish_reason = choice.get("finish_reason") or turn.finish_reason
    usage = event.get("usage")
    if isinstance(usage, dict):
        turn.prompt_tokens = int(usage["prompt_tokens"])
        turn.completion_tokens = int(usage["completion_tokens"])
        turn.cached_tokens = int(
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        )
