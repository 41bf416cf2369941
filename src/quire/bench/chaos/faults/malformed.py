"""Wrong requests: fuzzed bodies and heads, too large, half sent. Each gets a 4xx or a closed connection."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from random import Random

from quire.bench.chaos.faults.base import Fault, Site, Struck
from quire.bench.chaos.server import BODY_BYTES
from quire.bench.chaos.wire import Address, Call, Kind, Reply, ask

BODIES, HEADS, HALVES = 60, 16, 16
SECONDS = 20.0
"""A fuzzed request may still be a valid one that takes long; then its client leaves."""
VALUES: tuple[object, ...] = (
    None, True, -1, 0, 2**63, -(2**70), 1e308, 0.5, "", "x" * 3000, "\u0000", "\ud800", [], [[]], [None],
    {}, {"a": {"b": []}}, [{"role": "user"}], {"type": "json_schema"}, ["a"] * 3000, "\U0001f600" * 99,
)  # fmt: skip
TEXTS = (
    b"",
    b"{",
    b"[" * 5000,
    b"null",
    b"{}",
    b"\xff\xfe",
    b'{"a":' * 500,
    b"NaN",
    b'{"prompt":"a"}}',
)


class MalformedRequests(Fault):
    name = "malformed-requests"

    async def strike(self, site: Site, draw: Random) -> Struck:
        address = site.server.address
        bodies = [_fuzzed(draw.choice(site.small), draw) for _ in range(BODIES)]
        sent = [
            ask(address, call, deadline=SECONDS) for call in [*bodies, _too_large(site.small[0])]
        ]
        heads = [_head(draw.choice(site.small), address, draw) for _ in range(HEADS)]
        halves = [
            _half(address, draw.choice(site.small), Random(draw.random())) for _ in range(HALVES)
        ]
        outcomes = await asyncio.gather(*sent)
        answers = await asyncio.gather(*(_raw(address, head) for head in heads))
        await asyncio.gather(*halves)
        problems = [
            f"a malformed body got {outcome.kind.value} {outcome.status}: {outcome.detail}; "
            f"it was {call.body[:200]!r}"
            for outcome, call in zip(outcomes, bodies, strict=False)
            if outcome.kind in (Kind.ERROR, Kind.BROKEN, Kind.UNREACHABLE)
        ]
        if outcomes[-1].status != 413:
            problems.append(f"a body that is too large got {outcomes[-1].status}, not 413")
        problems += [
            f"a malformed head got {status}; it began {head[:200]!r}"
            for status, head in zip(answers, heads, strict=True)
            if not (status == 0 or 200 <= status < 500) or status < 0
        ]
        kinds = Counter(outcome.kind.value for outcome in outcomes)
        return Struck({"bodies": dict(kinds), "heads": dict(Counter(answers))}, problems)


def _fuzzed(call: Call, draw: Random) -> Call:
    return replace(call, body=_body(call.body, draw), stream=None)


def _body(body: bytes, draw: Random) -> bytes:
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(TEXTS)
    if kind == 1:
        changed = bytearray(body)
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    if kind == 2:
        start = draw.randrange(len(body))
        return body[:start] + body[draw.randrange(len(body)) :]
    fields = json.loads(body)
    name = draw.choice(
        [*fields, "logit_bias", "logprobs", "stop_token_ids", "priority", "tools", "bad_words"]
    )
    if name != "max_tokens":  # it bounds what a request that is still valid costs
        fields[name] = draw.choice(VALUES)
    return json.dumps(fields).encode()


def _too_large(call: Call) -> Call:
    return replace(call, body=json.dumps({"prompt": "a" * (BODY_BYTES + 1)}).encode(), stream=None)


def _head(call: Call, address: Address, draw: Random) -> bytes:
    """A request whose head is wrong, or whose body is not what its head says."""
    message = call.message(address.name)
    first, rest = message.split(b"\r\n", 1)
    length = f"Content-Length: {len(call.body)}".encode()
    return draw.choice(
        [
            bytes(draw.randrange(256) for _ in range(200)) + b"\r\n\r\n",
            b"GET\r\n\r\n",
            first.replace(b"HTTP/1.1", b"HTTP/9.9") + b"\r\n" + rest,
            first.replace(b"/v1", b"//v1/../\xff") + b"\r\n" + rest,
            message.replace(length, b"Content-Length: -5"),
            message.replace(length, b"Content-Length: 5\r\n" + length),
            message.replace(length, b"Transfer-Encoding: chunked"),
            message.replace(length, b"Transfer-Encoding: chunked\r\n" + length),
            message.replace(b"Bearer", b"Bearer \x00\xff"),
            message.replace(b"application/json", b"text/plain"),
            first + b"\r\nX-Long: " + b"a" * 70_000 + b"\r\n" + rest,
            first + b"\r\n" + b"X-Many: 1\r\n" * 5000 + rest,
            first + b"\r\nX\x00Y: 1\r\n" + rest,
        ]
    )


async def _raw(address: Address, message: bytes) -> int:
    """The status of the answer; 0 if the connection was closed without one, -1 if neither came."""
    reply = Reply()
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await address.connect()
            try:
                writer.write(message)
                writer.write_eof()
                while (data := await reader.read(1 << 16)) and not reply.problem:
                    reply.feed(data)
            finally:
                writer.close()
    except TimeoutError:
        return -1
    except OSError:
        pass
    return reply.status


async def _half(address: Address, call: Call, draw: Random) -> None:
    """Send a part, be silent for a while, leave."""
    message = call.message(address.name)
    with suppress(OSError):
        _, writer = await address.connect()
        writer.write(message[: draw.randrange(len(message) - 1)])
        await asyncio.sleep(draw.uniform(0.5, 2))
        writer.close()
