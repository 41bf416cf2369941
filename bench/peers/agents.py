"""W6: the sessions of `quire.bench.agents` as token ids, sent to a server and measured.

Every server gets the same requests: random ids of the asked length stand for the answers in the history, for
servers return text, which does not encode to the ids that were generated. So a prefix cache has the earlier
prompt and not the answer after it. Each turn is due one think time after the end of the answer before it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.peers import client
from bench.peers.servers import Server
from bench.peers.workloads import ModelShape, random_tokens

from quire.bench.agents import AgentShape, Session, interactivity, schedule

FULL = AgentShape()
SMOKE = AgentShape(
    sessions=2, turns=3, system_len=64, tool_len=(8, 24), output_len=(4, 8), think_time=0.05
)
LONGEST = 8192
"""Tokens that a session may have; the longest has 7,457."""


def with_room(model: ModelShape) -> ModelShape:
    """The model's shape, for servers that keep all sessions in their KV cache."""
    return replace(
        model,
        max_model_len=LONGEST,
        kv_cache_bytes=FULL.sessions * LONGEST * model.kv_bytes_per_token,
        server_slots=FULL.sessions,
        slot_tokens=LONGEST,
    )


def prompt_ids(session: Session, turn: int, vocab_size: int, repeat: int) -> list[int]:
    """New contents at each repeat, and the same for all servers."""
    return [
        token
        for piece in session.prompt(turn)
        for token in random_tokens(
            random.Random(f"W6/{repeat}/{piece.name}"), vocab_size, piece.num_tokens
        )
    ]


def body(
    server: Server, session: Session, turn: int, vocab_size: int, repeat: int
) -> dict[str, object]:
    ids = prompt_ids(session, turn, vocab_size, repeat)
    request = client.completion(server.model, ids, session.turns[turn].output_len)
    return (
        request
        if server.session_field is None
        else request | {server.session_field: session.number}
    )


@dataclass(frozen=True, slots=True)
class TurnTimes:
    """One turn: when it was due, and its answer."""

    due: float
    reply: client.Reply


@dataclass(frozen=True, slots=True)
class AgentsResult:
    """W6's measures. Times in milliseconds, from when a turn was due."""

    interactivity: float
    """Output tokens per second: see `quire.bench.agents.interactivity`."""
    ttft_p50: float
    ttft_p99: float
    latency_p50: float
    """To a turn's last token."""
    latency_p99: float
    cached_share: float
    """Of all prompt tokens, those that the server says it had in its prefix cache; 0 if it does not say."""
    seconds: float


async def replay(
    port: int, server: Server, vocab_size: int, repeat: int, shape: AgentShape
) -> AgentsResult:
    """Run all sessions to their end. Raises RuntimeError if an answer has other than the tokens asked for."""
    sessions = schedule(shape, seed=0)
    bodies = [
        [body(server, s, turn, vocab_size, repeat) for turn in range(shape.turns)] for s in sessions
    ]
    started = time.perf_counter()

    async def one(session: Session) -> list[TurnTimes]:
        turns = []
        due = started + session.start
        for turn, request in zip(session.turns, bodies[session.number], strict=True):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            reply = await client.stream(port, "/v1/completions", request)
            if reply.num_tokens != turn.output_len:
                raise RuntimeError(f"a turn got {reply.num_tokens} tokens for {turn.output_len}.")
            turns.append(TurnTimes(due, reply))
            due = reply.token_times[-1] + shape.think_time
        return turns

    done = await asyncio.gather(*map(one, sessions))
    turns = [turn for session in done for turn in session]
    return summarize(turns, time.perf_counter() - started)


def summarize(turns: Sequence[TurnTimes], seconds: float) -> AgentsResult:
    latency = [turn.reply.token_times[-1] - turn.due for turn in turns]
    ttft = [(turn.reply.token_times[0] - turn.due) * 1e3 for turn in turns]
    tokens = [turn.reply.num_tokens for turn in turns]
    prompt = sum(turn.reply.prompt_tokens for turn in turns)
    return AgentsResult(
        interactivity=interactivity(list(zip(latency, tokens, strict=True))),
        ttft_p50=client.percentile(ttft, 50),
        ttft_p99=client.percentile(ttft, 99),
        latency_p50=client.percentile(latency, 50) * 1e3,
        latency_p99=client.percentile(latency, 99) * 1e3,
        cached_share=sum(turn.reply.cached_tokens for turn in turns) / max(prompt, 1),
        seconds=seconds,
    )


def first_turns(shape: AgentShape) -> AgentShape:
    """For the warm-up: the first turn of each session."""
    return replace(shape, turns=1)
