"""The requests, and their answers when nothing else happens.

An answer depends on nothing but the request (docs/architecture.md), so one that comes in the middle of a
fault is either byte-equal to the recorded one or wrong. Requests differ in what they make the engine keep:
greedy and seeded, streamed and whole, several choices, a grammar, shared prefixes, adapters, long ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random

from quire.bench.chaos.adapters import NAMES as ADAPTERS
from quire.bench.chaos.wire import Address, Answer, Call, Kind, ask
from quire.errors import EngineError

TENANTS = {"red": "key-of-red", "blue": "key-of-blue"}
"""Tenant -> its API key."""
SMALL, LARGE = 18, 10
"""Requests of each kind."""
WORDS = (
    "the file of a value in list returns new name and time to set it for each path with one "
    "item from another string if not found error key data open close first last number text"
).split()
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
RECORD_SECONDS = 300.0


def small_calls(seed: int) -> tuple[Call, ...]:
    """Of 10 to 150 words, and 8 to 48 tokens."""
    draw = Random(f"{seed}/small")
    prefixes = [_text(draw, 70) for _ in range(3)]
    return tuple(_small(draw, f"small-{number}", prefixes) for number in range(SMALL))


def _small(
    draw: Random, name: str, prefixes: Sequence[str], more: Mapping[str, object] | None = None
) -> Call:
    prompt = _text(draw, draw.randrange(8, 60))
    if draw.random() < 0.5:
        prompt = f"{draw.choice(prefixes)} {prompt}"
    fields: dict[str, object] = {"max_tokens": draw.randrange(8, 49), "return_token_ids": True}
    fields |= more or {}
    fields |= _sampling(draw)
    kind = draw.random()
    if kind < 0.15:
        fields |= {"n": 2, "temperature": 0.9, "seed": draw.randrange(1000)}
    elif kind < 0.3:
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "thing", "schema": SCHEMA},
        }
    elif kind < 0.45:
        fields["stop"] = [" in", " to"]
    if draw.random() < 0.3:
        fields["messages"] = [{"role": "user", "content": prompt}]
        return _call(draw, name, "/v1/chat/completions", fields)
    return _call(draw, name, "/v1/completions", fields | {"prompt": prompt})


def large_calls(seed: int) -> tuple[Call, ...]:
    """Half of them with long prompts, half with long answers: those are admitted while they are short, grow,
    and preempt one another. A few of them fill the KV cache."""
    draw = Random(f"{seed}/large")
    calls = []
    for number in range(LARGE):
        words, tokens = (
            (draw.randrange(150, 250), 60) if number % 2 else (10, draw.randrange(200, 280))
        )
        fields = {"prompt": _text(draw, words), "max_tokens": tokens, "ignore_eos": True}
        fields |= {"return_token_ids": True, **_sampling(draw)}
        calls.append(_call(draw, f"large-{number}", "/v1/completions", fields))
    return tuple(calls)


def adapted_calls(seed: int) -> tuple[Call, ...]:
    """Two for each adapter."""
    draw = Random(f"{seed}/adapted")
    return tuple(
        _small(draw, f"{name}-{number}", [_text(draw, 40)], {"model": name})
        for name in ADAPTERS
        for number in range(2)
    )


def fresh_calls(draw: Random, count: int) -> list[Call]:
    """Prompts that were never sent before, so that their KV is new; their answers are not known."""
    fields = {"max_tokens": 4, "temperature": 0}
    return [
        _call(draw, "fresh", "/v1/completions", fields | {"prompt": _text(draw, 200)})
        for _ in range(count)
    ]


def _sampling(draw: Random) -> dict[str, object]:
    if draw.random() < 0.5:
        return {"temperature": 0}
    return {"temperature": draw.choice([0.7, 1.0]), "top_p": 0.95, "seed": draw.randrange(1000)}


def _call(draw: Random, name: str, path: str, fields: dict[str, object]) -> Call:
    key = draw.choice(list(TENANTS.values()))
    fields = fields | {"stream": draw.random() < 0.6}
    return Call(
        name,
        path,
        json.dumps(fields).encode(),
        {"Authorization": f"Bearer {key}"},
        stream=bool(fields["stream"]),
    )


def _text(draw: Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


async def record(address: Address, calls: Sequence[Call]) -> dict[str, Answer]:
    """Each request's answer, alone on the server. Raises `EngineError` if one is refused."""
    answers = {}
    for call in calls:
        outcome = await ask(address, call, deadline=RECORD_SECONDS)
        if outcome.kind is not Kind.ANSWER or outcome.answer is None:
            raise EngineError(
                f"{call.name} got no answer without any fault: {outcome.kind.value}, {outcome.detail}"
            )
        answers[call.name] = outcome.answer
    return answers
