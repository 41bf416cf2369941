"""Adapters of `AsyncLLM`: files are read in threads, and calls about one name follow each other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from weakref import WeakValueDictionary

from quire.config import ADAPTER_NAME
from quire.engine.adapters import Adapter, AdapterRegistry
from quire.errors import InvalidParameterError, ModelError, ModelNotFoundError
from quire.lora.request import LoRARequest
from quire.messages import AddAdapter, ControlAction, CoreInput, LoadAdapter

logger = logging.getLogger(__name__)

ABSENT_SECONDS = 2.0
"""How long a name counts as absent that was looked for in `lora_dir`."""
MAX_ABSENT = 1024


class AsyncAdapters:
    """All calls from one event loop."""

    def __init__(
        self,
        registry: AdapterRegistry,
        model_names: Sequence[str],
        send: Callable[[Sequence[CoreInput]], None],
        control: Callable[[ControlAction], Awaitable[object]],
    ) -> None:
        """send: sends these messages, and those about versions that are no longer needed."""
        self._registry = registry
        self._model_names = model_names
        self._send = send
        self._control = control
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._absent: OrderedDict[str, float] = OrderedDict()
        """Names that were looked for, and until when they need not be looked for again."""

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._registry)

    async def start(self) -> None:
        """Serve the configured adapters. As many as there is room for are in memory then.

        Raises `ConfigError` or `ModelError` for one that cannot be served.
        """
        config = self._registry.config
        for index, module in enumerate(config.modules):
            request = self._registry.new_request(module.name, module.path, module.base_model_name)
            adapter = await asyncio.to_thread(self._registry.read, request)
            await self._serve(adapter, load=index < config.capacity)

    async def find(self, name: str) -> Adapter | None:
        """The adapter of this name, perhaps after looking for it in `lora_dir`.

        Raises `InvalidParameterError` if it is there and cannot be served.
        """
        found = self._registry.find(name)
        if found is not None or not self._may_look_for(name):
            return found
        async with self._lock(name):
            found = self._registry.find(name)
            if found is not None or not self._may_look_for(name):
                return found
            path = await asyncio.to_thread(self._registry.located, name)
            if path is None:
                self._absent[name] = time.monotonic() + ABSENT_SECONDS
                if len(self._absent) > MAX_ABSENT:
                    self._absent.popitem(last=False)
                return None
            request = self._registry.new_request(name, path)
            try:
                found = await asyncio.to_thread(self._registry.read, request)
            except ModelError as error:
                raise InvalidParameterError(
                    f"LoRA adapter '{name}' was found but could not be loaded: {error}",
                    param="model",
                ) from None
            await self._serve(found, load=False)
            return found

    async def load(self, name: str, path: str, *, replace: bool = False) -> None:
        """Serve the adapter at a client's path, once it is in memory. replace: in the place of the one of
        that name, if there is one.

        Raises `InvalidParameterError` for a name or a file that cannot be served, `ModelNotFoundError` if
        there is none, `EngineSleepingError`.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidParameterError(
                "lora_name must have 1 to 128 letters, digits and _ . : -, or two such parts with / between "
                "them.",
                param="lora_name",
            )
        if name in self._model_names:
            raise InvalidParameterError(
                f"The lora adapter '{name}' conflicts with a served base model.", param="lora_name"
            )
        async with self._lock(name):
            if not replace and self._registry.find(name) is not None:
                raise InvalidParameterError(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the "
                    "adapter in place, set 'load_inplace' to True.",
                    param="lora_name",
                )
            found = await asyncio.to_thread(self._registry.confined, name, path)
            request = self._registry.new_request(name, found)
            try:
                adapter = await asyncio.to_thread(self._registry.read, request)
                await self._serve(adapter, load=True)
            except ModelError as error:
                raise InvalidParameterError(
                    f"Loading lora {name} failed: {error}", param="lora_path"
                ) from None
            self._absent.pop(name, None)
            logger.info("loaded adapter %s, rank %d", name, adapter.rank)

    async def unload(self, name: str) -> None:
        """Later requests do not find it; those that were accepted are served.

        Raises `ModelNotFoundError`.
        """
        async with self._lock(name):
            if self._registry.find(name) is None:
                raise ModelNotFoundError(
                    f"The lora adapter '{name[:256]}' cannot be found.",
                    param="lora_name",
                    value=name,
                )
            self._registry.remove(name)
            self._send([])
            logger.info("removed adapter %s", name)

    async def use(self, request: LoRARequest) -> str:
        """The name under which the next request finds this adapter, if it is submitted at once."""
        adapter = self._registry.of(request)
        if adapter is None:
            adapter = await asyncio.to_thread(self._registry.read, request)
        self._send(self._registry.publish(adapter, replaces=False))
        return adapter.name

    async def _serve(self, adapter: Adapter, *, load: bool) -> None:
        """Publish it; load: after the core has loaded it, or not at all."""
        if load:
            self._send([AddAdapter(adapter.key, str(adapter.path))])
            try:
                await self._control(LoadAdapter(adapter.key))
            except BaseException:
                self._registry.discard(adapter)
                self._send([])
                raise
        self._send(self._registry.publish(adapter))

    def _may_look_for(self, name: str) -> bool:
        if not self._registry.config.lora_dir or not ADAPTER_NAME.fullmatch(name):
            return False
        return self._absent.get(name, 0.0) <= time.monotonic()

    def _lock(self, name: str) -> asyncio.Lock:
        """Of this name, as long as somebody holds it or waits for it."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
