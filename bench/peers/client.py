"""A small streaming HTTP client: the same one for every server, cheap enough to share their two cores.

One connection per request, HTTP/1.1 with chunked or plain bodies, server-sent events. While a request runs
it only notes when bytes came; parsing waits until everything is over. Only the standard library.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Reply:
    """One streamed answer. Times are `time.perf_counter()` seconds."""

    sent: float
    token_times: list[float] = field(default_factory=list)
    """When each event with text came."""
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, from the server's prefix cache; 0 if it does not say."""
    events: list[dict[str, object]] = field(default_factory=list)


async def stream(port: int, path: str, body: dict[str, object]) -> Reply:
    """POST `body` and read the event stream to its end. Raises RuntimeError on any other status than 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    reply = Reply(sent=time.perf_counter())
    writer.write(head.encode() + data)
    await writer.drain()
    raw: list[tuple[float, bytes]] = []
    try:
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        while chunk := await reader.read(1 << 16):
            raw.append((time.perf_counter(), chunk))
    finally:
        writer.close()
    if status != 200:
        text = b"".join(chunk for _, chunk in raw)[:400].decode(errors="replace")
        raise RuntimeError(f"{path} answered {status}: {text}")
    _parse(raw, reply)
    return reply


def _parse(raw: Sequence[tuple[float, bytes]], reply: Reply) -> None:
    """Events, each with the time its last byte came. A chunked body's sizes stand on lines of their own."""
    rest = b""
    for when, chunk in raw:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                continue
            event = json.loads(payload)
            if "error" in event:
                raise RuntimeError(f"the server answered {event['error']}")
            reply.events.append(event)
            if _text(event):
                reply.token_times.append(when)
            usage = event.get("usage")
            if usage:
                reply.num_tokens = usage["completion_tokens"]
                reply.prompt_tokens = usage.get("prompt_tokens") or 0
                details = usage.get("prompt_tokens_details") or {}
                reply.cached_tokens = details.get("cached_tokens") or 0


def _text(event: dict[str, object]) -> object:
    """The text of an OpenAI completion chunk, or of llama.cpp's own."""
    choices = event.get("choices")
    if isinstance(choices, list):
        return choices[0].get("text") if choices else ""
    return event.get("content")


@dataclass(frozen=True, slots=True)
class LoadResult:
    """W5's measures, in milliseconds."""

    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    itl_p50: float
    itl_p99: float
    seconds: float


async def answer(port: int, model: str, prompt: list[int]) -> None:
    """One request of one token: from then on the server has answered."""
    reply = await stream(port, "/v1/completions", completion(model, prompt, 1))
    if reply.num_tokens != 1:
        raise RuntimeError(f"a request got {reply.num_tokens} tokens for 1.")


async def load(
    port: int, model: str, requests: Sequence[tuple[list[int], int]], arrivals: Sequence[float]
) -> LoadResult:
    """Send each request at its arrival time and measure. TTFT counts from the moment it was due."""
    start = time.perf_counter() + 0.05

    async def one(prompt: list[int], max_tokens: int, at: float) -> tuple[float, Reply]:
        due = start + at
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        reply = await stream(port, "/v1/completions", completion(model, prompt, max_tokens))
        if reply.num_tokens != max_tokens:
            raise RuntimeError(f"a request got {reply.num_tokens} tokens for {max_tokens}.")
        return due, reply

    done = await asyncio.gather(
        *(one(p, n, at) for (p, n), at in zip(requests, arrivals, strict=True))
    )
    return summarize(done, time.perf_counter() - start)


def completion(model: str, prompt: list[int], max_tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def summarize(done: Sequence[tuple[float, Reply]], seconds: float) -> LoadResult:
    """done: when each request was due, and its reply."""
    ttft = [(reply.token_times[0] - due) * 1e3 for due, reply in done]
    tpot = [
        (reply.token_times[-1] - reply.token_times[0]) * 1e3 / (reply.num_tokens - 1)
        for _, reply in done
    ]
    itl = [
        (later - sooner) * 1e3
        for _, reply in done
        for sooner, later in zip(reply.token_times, reply.token_times[1:], strict=False)
    ]
    return LoadResult(
        percentile(ttft, 50),
        percentile(ttft, 99),
        percentile(tpot, 50),
        percentile(tpot, 99),
        percentile(itl, 50),
        percentile(itl, 99),
        seconds,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
