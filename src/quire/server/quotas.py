"""Quotas of a tenant: requests and tokens a minute, and requests at a time.

A rate is a bucket that holds a minute's worth and fills evenly (the generic cell rate algorithm, ITU-T I.371:
one number is its state). Tokens are reserved before a request starts, the prompts' and the most that it may
generate, and what it did not use is given back at its end. A request that is refused, here or later, takes
nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from quire.outputs import RequestOutput
from quire.server.engine_protocol import RequestStream
from quire.server.errors import ApiError, retry_headers

ROUNDING_SECONDS = 1e-6
"""A minute's worth, taken one by one, is a minute but for rounding."""


class Bucket:
    """per_minute: its size, and what flows in during a minute."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._full_at = 0.0
        """When it will be full."""

    def remaining(self, now: float) -> float:
        return self.per_minute - max(0.0, self._full_at - now) * self.per_minute / 60

    def whole(self, now: float) -> int:
        """`remaining` in whole units; what is owed is not shown."""
        rounding = ROUNDING_SECONDS * self.per_minute / 60
        return max(0, min(self.per_minute, math.floor(self.remaining(now) + rounding)))

    def reset_seconds(self, now: float) -> float:
        """Until it is full."""
        return max(0.0, self._full_at - now)

    def wait_seconds(self, amount: float, now: float) -> float:
        """Until it holds `amount`, or is full."""
        missing = min(amount, self.per_minute) - self.remaining(now)
        seconds = missing * 60 / self.per_minute
        return seconds if seconds > ROUNDING_SECONDS else 0.0

    def take(self, amount: float, now: float) -> Charge:
        """More than it holds makes later ones wait."""
        charge = Charge(self, amount, 60 / self.per_minute)
        self.delay(amount * charge.seconds_per_unit, now)
        return charge

    def delay(self, seconds: float, now: float) -> None:
        self._full_at = max(self._full_at, now) + seconds

    def resize(self, per_minute: int, now: float) -> None:
        """The part that is used stays."""
        used = max(0.0, self._full_at - now)
        self.per_minute, self._full_at = per_minute, now + used


@dataclass(frozen=True, slots=True)
class Charge:
    """What was taken from a bucket. It is returned to the same bucket at the rate that it had then, so a
    change of the rate, or of the bucket, returns neither more nor less."""

    bucket: Bucket
    amount: float
    seconds_per_unit: float

    def settle(self, used: float, now: float) -> None:
        """Return what was not used, or charge what was used beyond it."""
        self.bucket.delay((used - self.amount) * self.seconds_per_unit, now)


@dataclass(slots=True)
class Lease:
    """What a request has taken. What it does not use is given back when its last stream ends."""

    quotas: Quotas
    charges: dict[str, Charge]
    """By the kind of their buckets."""
    num_streams: int = 0
    used: int = 0
    """Tokens."""
    is_over: bool = False

    def metered(self, stream: RequestStream, num_prompt_tokens: int) -> RequestStream:
        self.num_streams += 1
        self.used += num_prompt_tokens
        return _Metered(stream, self)

    def cancel(self) -> None:
        """It was refused: all is given back."""
        self._end({"requests": 0, "tokens": 0})

    def stream_ended(self) -> None:
        self.num_streams -= 1
        if not self.num_streams:
            self._end({"requests": 1, "tokens": self.used})

    def _end(self, used: dict[str, int]) -> None:
        if not self.is_over:
            self.is_over = True
            self.quotas.give_back(self.charges, used)


class _Metered:
    """A `RequestStream` whose tokens count."""

    def __init__(self, stream: RequestStream, lease: Lease) -> None:
        self._stream, self._lease = stream, lease
        self._is_over = False

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    @property
    def sequence_ids(self) -> Sequence[int]:
        return self._stream.sequence_ids

    @property
    def last(self) -> RequestOutput | None:
        return self._stream.last

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        try:
            async for output in self._stream:
                self._lease.used += sum(len(each.token_ids) for each in output.outputs)
                yield output
        finally:
            self._end()

    def abort(self) -> None:
        self._stream.abort()
        self._end()

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._lease.stream_ended()


class Quotas:
    """Of one tenant. None: no limit."""

    def __init__(
        self,
        rpm: int | None = None,
        tpm: int | None = None,
        concurrency: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._rates: dict[str, Bucket] = {}
        self.num_running = 0
        self.refused: Counter[str] = Counter()
        """By limit."""
        self.change(rpm, tpm, concurrency)

    def change(self, rpm: int | None, tpm: int | None, concurrency: int | None) -> None:
        now = self._clock()
        self._concurrency = concurrency
        for kind, rate in (("requests", rpm), ("tokens", tpm)):
            bucket = self._rates.get(kind)
            if rate is None:
                self._rates.pop(kind, None)
            elif bucket is None:
                self._rates[kind] = Bucket(rate)
            else:
                bucket.resize(rate, now)

    def take(self, tokens: int) -> Lease:
        """For one request. tokens: what it may use at most. A request that asks for more than a minute's
        tokens starts when the bucket is full, and those after it wait longer.

        Raises a 429 `ApiError`, and takes nothing then."""
        now = self._clock()
        if self._concurrency is not None and self.num_running >= self._concurrency:
            raise self._refusal("concurrency", self._concurrency, 1.0)
        amounts = {"requests": 1, "tokens": tokens}
        for kind, bucket in self._rates.items():
            wait = bucket.wait_seconds(amounts[kind], now)
            if wait > 0:
                raise self._refusal(kind, bucket.per_minute, wait)
        self.num_running += 1
        return Lease(
            self, {kind: bucket.take(amounts[kind], now) for kind, bucket in self._rates.items()}
        )

    def give_back(self, charges: dict[str, Charge], used: dict[str, int]) -> None:
        """At the end of a request."""
        self.num_running -= 1
        now = self._clock()
        for kind, charge in charges.items():
            charge.settle(used[kind], now)

    def headers(self) -> dict[str, str]:
        """As OpenAI's API has them: what is left, and when all of it is there again."""
        now, found = self._clock(), {}
        for kind, bucket in self._rates.items():
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
            found[f"x-ratelimit-remaining-{kind}"] = str(bucket.whole(now))
            found[f"x-ratelimit-reset-{kind}"] = go_duration(bucket.reset_seconds(now))
        return found

    def _refusal(self, kind: str, limit: int, seconds: float) -> ApiError:
        self.refused[kind] += 1
        what = {"requests": "requests a minute", "tokens": "tokens a minute"}.get(
            kind, "requests at a time"
        )
        headers = self.headers() | retry_headers(seconds)
        return ApiError(429, f"Your limit of {limit} {what} is reached.", headers=headers)


def go_duration(seconds: float) -> str:
    """As Go prints durations, which clients parse: 6m0s, 1.5s, 12ms, 0s."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    rest = f"{milliseconds / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
