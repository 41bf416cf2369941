"""Which LoRA adapters are in memory: least recently used ones give way to those that requests wait for."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from quire.errors import CheckpointError, EngineSleepingError
from quire.executor.base import Executor
from quire.messages import AddRequest


class Residence(Enum):
    """Where an adapter is that a request waits for."""

    LOADED = "in memory"
    LOADING = "being loaded, or next in turn"
    NO_ROOM = "all adapters in memory are in use"


class AdapterMemory:
    """The versions of adapters that requests may name, and which of them are in memory.

    At most `capacity` are, one being loaded included. One that a request in the scheduler uses is pinned.
    A version is forgotten when it was dropped and no accepted request names it.
    """

    def __init__(self, executor: Executor, capacity: int) -> None:
        self._executor = executor
        self._capacity = capacity
        self._paths: dict[str, Path] = {}
        self._dropped: set[str] = set()
        self._memory: OrderedDict[str, None] = OrderedDict()
        """Least recently used first."""
        self._loading: str | None = None
        self._failed: dict[str, str] = {}
        """Why loading failed, since the last `collect`."""
        self._users: Counter[str] = Counter()
        self._adapter_of: dict[int, str] = {}
        """By id, of the requests that are accepted and have not ended."""
        self._pinned: dict[int, str] = {}
        self._pins: Counter[str] = Counter()

    def add(self, key: str, path: str) -> None:
        """A version that requests may name from now on."""
        self._paths[key] = Path(path)
        self._dropped.discard(key)

    def drop(self, key: str) -> None:
        """No later request names it."""
        self._dropped.add(key)
        self._forget(key)

    def clear(self) -> None:
        """The executor has dropped all adapters, because it sleeps."""
        assert not self._pinned and self._loading is None
        self._memory.clear()

    # --- requests ---------------------------------------------------------------------------------

    def accept(self, message: AddRequest) -> None:
        """Raises as `check`."""
        key = message.placement.adapter
        if key is not None:
            self.check(key)
            self._adapter_of[message.request_id] = key
            self._users[key] += 1

    def check(self, key: str) -> None:
        """Raises `CheckpointError` if the version is not known, and `EngineSleepingError`."""
        if self._executor.adapters is None:
            raise EngineSleepingError("The engine sleeps.")
        if key not in self._paths:
            raise CheckpointError(f"The adapter {name_of(key)} is not loaded.")

    def pin(self, message: AddRequest) -> None:
        """The request goes to the scheduler; its adapter is in memory."""
        key = message.placement.adapter
        if key is not None:
            self._memory.move_to_end(key)
            self._pinned[message.request_id] = key
            self._pins[key] += 1

    def end(self, request_id: int) -> None:
        """The request has ended; any request."""
        key = self._adapter_of.pop(request_id, None)
        if key is None:
            return
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
        if self._pinned.pop(request_id, None) is not None:
            self._pins[key] -= 1
        self._forget(key)

    def waiting_names(self, running: Mapping[str, int]) -> list[str]:
        """Names of the adapters of requests that wait, sorted. running: the number of running requests by
        adapter."""
        keys = (key for key, count in self._users.items() if count > running.get(key, 0))
        return sorted({name_of(key) for key in keys})

    # --- memory -----------------------------------------------------------------------------------

    def collect(self) -> None:
        """Take note of what has been loaded, or has failed, since the last call."""
        self._failed.clear()
        if self._loading is None or (store := self._executor.adapters) is None:
            return
        for load in store.poll():
            if load.key == self._loading:
                self._loading = None
                if load.error is None:
                    self._memory[load.key] = None
                else:
                    self._failed[load.key] = load.error
                self._forget(load.key)

    def find(self, key: str) -> Residence:
        """Ask for an adapter, in the order in which requests shall get theirs. Begins to load it if nothing
        else is being loaded and there is room or an adapter that may give way.

        Raises `CheckpointError` if it could not be loaded.
        """
        if key in self._memory:
            return Residence.LOADED
        if key in self._failed:
            raise CheckpointError(
                f"The adapter {name_of(key)} cannot be served: {self._failed[key]}"
            )
        self.check(key)
        if self._loading is not None:
            return Residence.LOADING
        store = self._executor.adapters
        assert store is not None, "the engine has no adapters"
        if len(self._memory) >= self._capacity:
            idle = next((each for each in self._memory if not self._pins[each]), None)
            if idle is None:
                return Residence.NO_ROOM
            self._evict(idle)
        self._loading = key
        store.load(key, self._paths[key])
        return Residence.LOADING

    def wait(self, seconds: float) -> None:
        """Wait until loading ends, at most so long."""
        store = self._executor.adapters
        if self._loading is not None and store is not None:
            store.wait(seconds)

    @property
    def in_memory(self) -> list[str]:
        """The keys of those that are, least recently used first."""
        return list(self._memory)

    @property
    def is_loading(self) -> bool:
        return self._loading is not None

    def _evict(self, key: str) -> None:
        del self._memory[key]
        store = self._executor.adapters
        assert store is not None
        store.drop(key)

    def _forget(self, key: str) -> None:
        """Forget the version if it was dropped and nothing needs it."""
        if key in self._dropped and not self._users[key] and key != self._loading:
            self._dropped.discard(key)
            del self._pins[key]
            self._paths.pop(key, None)
            if key in self._memory:
                self._evict(key)


def name_of(key: str) -> str:
    """The adapter's name, of NAME@HASH."""
    return key.rpartition("@")[0] or key
