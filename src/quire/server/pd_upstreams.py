"""The instances behind `quire pd-proxy`: which are up, how loaded they are, and which prefixes were sent to
each.

A choice is `Router`'s, between load and known prefixes. The proxy has no tokens, so prompts are compared as
bytes, and four bytes count as a token.
"""

from __future__ import annotations

import array
import asyncio
import logging
import re
from collections.abc import Collection, Hashable, Mapping, Sequence

import msgspec

from quire.engine.router import Router, RoutingRule
from quire.server.upstream import HttpError, check_url, exchange

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
RULE = RoutingRule(row_tokens=BYTES_PER_TOKEN * RoutingRule().row_tokens)
"""All else is relative, or of adapters, which are a part of the namespace here."""
CHECK_SECONDS = 2.0
"""Between two checks of an instance's /health."""
PATIENCE = 5.0
"""Seconds for its answer."""
DEFAULT_CACHE_TOKENS = 65_536
"""Of an instance whose /metrics do not say it."""
_CACHE = re.compile(r'^vllm:cache_config_info\{[^\n]*?kv_cache_size_tokens="([0-9]+)"', re.M)
_AROUND_MESSAGES = ("tools", "documents", "chat_template_kwargs", "reasoning_effort")


class Upstreams:
    """The instances of one role, by their URLs."""

    def __init__(self, role: str, urls: Sequence[str]) -> None:
        """Raises `ConfigError`."""
        for url in urls:
            check_url(url)
        self.role = role
        self.up: dict[str, bool] = dict.fromkeys((url.rstrip("/") for url in urls), False)
        """None is up before its first check."""
        self._router: Router[str] = Router(RULE)
        for url in self.up:
            self._router.add(url, cache_tokens=DEFAULT_CACHE_TOKENS * BYTES_PER_TOKEN)

    @property
    def urls_up(self) -> list[str]:
        return [url for url, is_up in self.up.items() if is_up]

    def load(self, url: str) -> int:
        """In tokens."""
        return self._router.load(url) // BYTES_PER_TOKEN

    def choose(
        self,
        request: Hashable,
        prompt: bytes,
        namespace: str,
        *,
        but: Collection[str] = (),
        down: bool = False,
    ) -> str | None:
        """The instance for a request, whose load counts until `end`. None: no other is up.

        namespace: requests that differ in it share no KV. but: instances that have failed on it.
        down: choose one that seems to be down, if no other is left.
        """
        among = [url for url in self.urls_up if url not in but]
        if not among and down:
            among = [url for url in self.up if url not in but]
        if not among:
            return None
        return self._router.choose(request, prompt, salt=namespace, among=among)

    def missing(self, request: Hashable) -> int:
        """Tokens of its prompt that were not sent to the chosen instance before, estimated."""
        return self._router.missing(request) // BYTES_PER_TOKEN

    def computed(self, request: Hashable) -> None:
        """Its prompt is computed."""
        self._router.computed(request)

    def end(self, request: Hashable) -> None:
        self._router.end(request)

    def fail(self, url: str, why: str, *, first: bool = False) -> None:
        """It is not chosen until a check finds it up. Its cache may be lost. first: say so in any case."""
        if self.up[url] or first:
            logger.warning("%s instance %s is down: %s", self.role, url, why)
            self.up[url] = False

    async def check(self, *, first: bool = False) -> None:
        """Check all of them."""
        await asyncio.gather(*(self._check(url, first) for url in self.up))

    async def watch(self) -> None:
        """Check all of them from time to time, for ever."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self.check()

    async def _check(self, url: str, first: bool) -> None:
        try:
            status, _ = await _get(url, "/health")
        except HttpError as error:
            self.fail(url, str(error), first=first)
            return
        if status != 200:
            self.fail(url, f"/health answers {status}.", first=first)
        elif first or not self.up[url]:
            _, page = await _get_quietly(url, "/metrics")
            found = _CACHE.search(page.decode("utf-8", "replace"))
            tokens = int(found[1]) if found else DEFAULT_CACHE_TOKENS
            self._router.add(url, cache_tokens=tokens * BYTES_PER_TOKEN)  # forgets what it had
            if not (self.up[url] or first):
                logger.info("%s instance %s is up", self.role, url)
            self.up[url] = True


async def _get(url: str, path: str) -> tuple[int, bytes]:
    try:
        async with (
            asyncio.timeout(PATIENCE),
            exchange(url, "GET", path, b"", {}, connect=PATIENCE) as answer,
        ):
            return answer.status, await answer.body()
    except TimeoutError:
        raise HttpError(f"{url}{path} has not answered for {PATIENCE:g} s.") from None


async def _get_quietly(url: str, path: str) -> tuple[int, bytes]:
    try:
        return await _get(url, path)
    except HttpError:
        return 0, b""


def prompt_of(body: Mapping[str, object]) -> bytes:
    """What determines a request's prompt, so that prompts with equal beginnings begin equally."""
    messages = body.get("messages")
    if isinstance(messages, list):
        around = [body.get(name) for name in _AROUND_MESSAGES]
        return b"".join(map(msgspec.json.encode, [around, *messages]))
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    if isinstance(prompt, list) and all(type(each) is int and 0 <= each < 2**32 for each in prompt):
        return array.array("I", prompt).tobytes()
    return msgspec.json.encode(prompt)
