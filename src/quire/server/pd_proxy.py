"""`quire pd-proxy`: one door for instances that compute prompts (P) and instances that generate (D).

A completion or chat completion goes to P with max_tokens 1; P's answer says where the prompt's KV is, and
with that D gets the client's request. If P is down, late or fails, D computes the prompt itself, with the
same tokens. P is not asked where that would not pay: for prompts of which little is left to compute,
and for requests whose prompt D has to compute anyway. Everything else passes through to D.

Nothing is sent twice: a request is tried again elsewhere only while its client has got nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import msgspec
from prometheus_client import Counter, Gauge, Histogram

from quire.config import ServerConfig
from quire.engine.handoff import KEY
from quire.metrics import new_registry, render
from quire.metrics.buckets import HTTP_SECONDS
from quire.server.errors import ANTHROPIC_PATH, ApiError, routed_path, unavailable
from quire.server.live import ClientGoneError, LiveRequests
from quire.server.middleware import BodyLimit, Receive, Scope, Send, send_error
from quire.server.pd_upstreams import Upstreams, prompt_of
from quire.server.process import bind, http_server, url_of
from quire.server.run import StopSignals, hand_over
from quire.server.sse import DONE, error_event, named_event
from quire.server.upstream import Answer, HttpError, exchange

logger = logging.getLogger(__name__)

MOST_TRIES = 2
PREFILLED = ("/v1/completions", "/v1/chat/completions")
NOT_PASSED_ON = frozenset(
    b"host content-length connection keep-alive transfer-encoding te trailer upgrade expect "
    b"accept-encoding proxy-connection date".split()
)
"""Headers of one connection, and what the proxy says itself. Answers are not compressed."""
BUSY = (429, 503)
"""Another instance may have room."""
NOT_FOR_P = (
    "stream", "stream_options", "n", "best_of", "min_tokens", "stop", "stop_token_ids", "logprobs",
    "top_logprobs", "logprob_token_ids", "response_format", "structured_outputs", "echo",
    "return_token_ids", "max_tokens", "max_completion_tokens",
)  # fmt: skip
"""Fields that do not change the prompt. P's one token is not used."""


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    prefill: tuple[str, ...]
    """URLs of instances that compute prompts."""
    decode: tuple[str, ...]
    threshold: int = 256
    """Tokens of a prompt that are to be computed, at least, for P to be asked."""
    prefill_timeout: float = 60.0
    """Seconds for P's answer."""


class PDProxy:
    """The ASGI application."""

    def __init__(self, options: ProxyOptions) -> None:
        """Raises `ConfigError`."""
        self._options = options
        self.prefill = Upstreams("prefill", options.prefill)
        self.decode = Upstreams("decode", options.decode)
        self.live = LiveRequests()
        self.leaving = self.draining = False
        self._registry = new_registry()
        self._ways = Counter(
            "quire:pd_requests",
            "Requests by who computed the prompt (prefill, decode) and why.",
            ["way", "reason"],
            registry=self._registry,
        )
        self._retries = Counter(
            "quire:pd_retries",
            "Requests that were sent to a second decode instance.",
            registry=self._registry,
        )
        self._broken = Counter(
            "quire:pd_broken_streams",
            "Streams that ended with an error, as their decode instance was lost.",
            registry=self._registry,
        )
        self._seconds = Histogram(
            "quire:pd_prefill_seconds",
            "Seconds until a prefill instance's answer.",
            buckets=HTTP_SECONDS,
            registry=self._registry,
        )
        up, load = (
            Gauge(f"quire:pd_upstream_{name}", text, ["role", "url"], registry=self._registry)
            for name, text in (
                ("up", "1 if requests are sent there."),
                (
                    "load_tokens",
                    "Tokens to compute and running requests there, as the proxy counts.",
                ),
            )
        )
        for upstreams in (self.prefill, self.decode):
            for url in upstreams.up:
                up.labels(upstreams.role, url).set_function(partial(upstreams.up.__getitem__, url))
                load.labels(upstreams.role, url).set_function(partial(upstreams.load, url))

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Checks the instances now and meanwhile."""
        await asyncio.gather(*(each.check(first=True) for each in (self.prefill, self.decode)))
        tasks = [asyncio.ensure_future(each.watch()) for each in (self.prefill, self.decode)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- HTTP -------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = routed_path(scope)
        if path in ("/health", "/ready", "/ping"):
            status, body = self.health()
            await _respond(send, status, {"content-type": "application/json"}, body)
        elif path == "/metrics":
            body, kind = render(self._registry)
            await _respond(send, 200, {"content-type": kind}, body)
        elif self.draining:
            await send_error(unavailable("The proxy is shutting down.", retry_after=1), scope, send)
        else:
            try:
                body = await _body(receive)
                live = self.live.open(())
                try:
                    await live.run(_Request(self, scope, body, send).serve(), receive)
                finally:
                    live.close()
            except ClientGoneError:
                pass
            except ApiError as error:
                await send_error(error, scope, send)

    def health(self) -> tuple[int, bytes]:
        """200 if requests can be served: one decode instance is enough."""
        good = bool(self.decode.urls_up) and not self.leaving
        whole = good and all([*self.prefill.up.values(), *self.decode.up.values()])
        body = {
            "status": "ok" if whole else "degraded" if good else "down",
            "prefill": self.prefill.up,
            "decode": self.decode.up,
        }
        return 200 if good else 503, msgspec.json.encode(body)

    # --- P ----------------------------------------------------------------------------------------

    def reason_without_p(self, path: str, asked: Mapping[str, object], missing: int) -> str:
        """Why P is not asked; "" if it is."""
        if path not in PREFILLED or not asked:
            return "endpoint"
        prompt, most = (
            asked.get("prompt"),
            asked.get("max_completion_tokens", asked.get("max_tokens")),
        )
        several = isinstance(prompt, list) and not all(isinstance(each, int) for each in prompt)
        scored = asked.get("prompt_logprobs") is not None
        scored |= bool(asked.get("echo")) and asked.get("logprobs") is not None
        if several or scored or most == 0 or asked.get("use_beam_search"):
            return "kind"
        if asked.get("skip_reading_prefix_cache"):
            return "kind"
        if missing < self._options.threshold:
            return "short"
        return "" if self.prefill.urls_up else "no_prefill"

    async def prefilled(
        self,
        path: str,
        asked: Mapping[str, object],
        prompt: bytes,
        namespace: str,
        headers: Mapping[str, str],
    ) -> dict[str, object] | None:
        """What P answers for D; None if it fails."""
        request = object()
        url = self.prefill.choose(request, prompt, namespace)
        if url is None:
            return None
        most = "max_completion_tokens" if "messages" in asked else "max_tokens"
        body = {name: value for name, value in asked.items() if name not in NOT_FOR_P}
        body |= {
            most: 1,
            "stream": False,
            KEY: {"do_remote_decode": True, "do_remote_prefill": False},
        }
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(self._options.prefill_timeout),
                exchange(
                    url, "POST", path, msgspec.json.encode(body), headers, silence=None
                ) as answer,
            ):
                content = await answer.body()
        except HttpError as error:
            self.prefill.fail(url, str(error))
            return None
        except TimeoutError:
            self.prefill.fail(url, f"no answer for {self._options.prefill_timeout:g} s.")
            return None
        finally:
            self.prefill.end(request)
        self._seconds.observe(time.monotonic() - began)
        if answer.status != 200:  # a mistake of the client's is D's to explain
            return None
        try:
            params = msgspec.json.decode(content)[KEY]
        except (msgspec.DecodeError, KeyError, TypeError):
            return None
        return params if isinstance(params, dict) else None

    def count(self, way: str, reason: str) -> None:
        self._ways.labels(way, reason).inc()

    def count_retry(self) -> None:
        self._retries.inc()

    def count_broken(self) -> None:
        self._broken.inc()


async def serve_proxy(
    options: ProxyOptions,
    config: ServerConfig,
    *,
    announce: Callable[[str], None],
    stop: StopSignals | None = None,
) -> int:
    """Serve until a signal, then let requests finish. config: of its own door. announce: called with the URL.
    Returns the exit status. Raises `ConfigError`."""
    proxy, stop = PDProxy(options), stop or StopSignals()
    server = http_server(BodyLimit(proxy, config.max_body_bytes), config)
    with contextlib.closing(bind(config)) as listener, stop.installed():
        http = asyncio.create_task(server.serve(sockets=[listener]), name="quire-http")
        try:
            await server.wait_started(http)
            async with proxy.watching():
                announce(url_of(listener, config))
                stopped = asyncio.ensure_future(stop.requested.wait())
                await asyncio.wait((http, stopped), return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                proxy.leaving = True
                await hand_over(server, stop, 0 if http.done() else config.drain_delay)
                proxy.draining = True
                await proxy.live.wait_idle(0 if http.done() else config.shutdown_timeout)
                proxy.live.terminate_all(unavailable("The proxy is shutting down.", retry_after=1))
        finally:
            server.should_exit = True
            await asyncio.wait((http,))
    return 0


class _Request:
    """One request of a client."""

    def __init__(self, proxy: PDProxy, scope: Scope, body: bytes, send: Send) -> None:
        self._proxy, self._scope, self._body, self._send = proxy, scope, body, send
        self._path = routed_path(scope)
        self._target = bytes(scope["raw_path"]).decode("latin-1")  # still quoted
        if query := scope.get("query_string"):
            self._target += "?" + query.decode("latin-1")
        self._headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope.get("headers", ())
            if name not in NOT_PASSED_ON
        }
        self._headers.setdefault("x-request-id", secrets.token_hex(16))  # one id in all logs
        self._headers.setdefault("via", "1.1 quire")  # so that it is not taken for this machine's
        self._started = False

    async def serve(self) -> None:
        """Raises `ApiError` if the client has got nothing."""
        proxy = self._proxy
        asked = self._asked()
        prompt = prompt_of(asked) if asked else b""
        namespace = f"{asked.get('model')}|{asked.get('cache_salt')}"
        tried: list[str] = []
        while len(tried) < MOST_TRIES:
            url = proxy.decode.choose(self, prompt, namespace, but=tried, down=True)
            if url is None:
                break
            try:
                if tried:
                    proxy.count_retry()
                else:
                    await self._prefill(asked, prompt, namespace)
                tried.append(url)
                if await self._relay(url, last=len(tried) == MOST_TRIES):
                    return
            finally:
                proxy.decode.end(self)
        raise unavailable("No decode instance answers.", retry_after=2)

    def _asked(self) -> dict[str, object]:
        """The body of a request for text, else {}. What only the proxy may say is dropped from any."""
        if self._scope["method"] != "POST":
            return {}
        try:
            asked = msgspec.json.decode(self._body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return {}  # D says what is wrong
        if not isinstance(asked, dict):
            return {}
        if asked.pop(KEY, None) is not None:
            self._body = msgspec.json.encode(asked)
        if self._path not in PREFILLED:
            return {}
        return {name: value for name, value in asked.items() if value is not None}

    async def _prefill(self, asked: Mapping[str, object], prompt: bytes, namespace: str) -> None:
        """If P has computed the prompt, tell D."""
        proxy = self._proxy
        reason = proxy.reason_without_p(self._path, asked, proxy.decode.missing(self))
        if not reason:
            params = await proxy.prefilled(self._path, asked, prompt, namespace, self._headers)
            if params is not None:
                self._body = msgspec.json.encode({**asked, KEY: params})
                proxy.decode.computed(self)
            reason = "" if params is not None else "prefill_failed"
        proxy.count("decode" if reason else "prefill", reason or "long")

    async def _relay(self, url: str, *, last: bool) -> bool:
        """Whether the client got an answer, whole or broken. last: there is no other try."""
        proxy = self._proxy
        try:
            async with exchange(
                url, self._scope["method"], self._target, self._body, self._headers, silence=None
            ) as answer:
                others = [each for each in proxy.decode.urls_up if each != url]
                if answer.status in BUSY and others and not last:
                    return False
                await self._copy(answer)
        except HttpError as error:
            proxy.decode.fail(url, str(error))
            if self._started:
                await self._break_off()
            return self._started
        return True

    async def _copy(self, answer: Answer) -> None:
        """Events one by one; any other answer as a whole, so that it can be asked for again."""
        headers = {
            name: value
            for name, value in answer.headers.items()
            if name.encode("latin-1") not in NOT_PASSED_ON
        }
        if not headers.get("content-type", "").startswith("text/event-stream"):
            body = b"" if self._scope["method"] == "HEAD" else await answer.body()
            self._started = True
            await _respond(self._send, answer.status, headers, body)
            return
        async for piece in answer.pieces():
            if not self._started:
                self._started = True
                await _start(self._send, answer.status, headers)
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        if not self._started:
            await _start(self._send, answer.status, headers)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _break_off(self) -> None:
        """End a stream whose decode instance is lost."""
        self._proxy.count_broken()
        error = unavailable("The decode instance of this request is lost.", retry_after=1)
        end = error_event(error) + DONE
        if self._path.startswith(ANTHROPIC_PATH):
            end = named_event("error", msgspec.json.encode(error.anthropic(self._scope)))
        await self._send({"type": "http.response.body", "body": end, "more_body": False})


async def _body(receive: Receive) -> bytes:
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(parts)


async def _start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _respond(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    await _start(send, status, {**headers, "content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body, "more_body": False})
