"""KV events: `--kv-events-config` with vLLM's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from quire.config.options import option, parse_json_object
from quire.errors import ConfigError

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5557"
"""Bound. vLLM's default, tcp://*:5557, would show the tokens of all prompts to the network."""
PUBLISHERS = (None, "zmq", "null")
HASHES = ("int", "bytes")


@dataclass(frozen=True, slots=True)
class KVEvents:
    """What is published where. The fields are the keys of `--kv-events-config`, with vLLM's defaults apart
    from `endpoint`; `bind` and `block_hashes` are Quire's own."""

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    """zmq, or null, which publishes nothing."""
    endpoint: str | None = None
    """Of the PUB socket. As in vLLM, an address with * or :: is bound, and any other is connected to.
    Default: `DEFAULT_ENDPOINT`, bound. Replica n of `--data-parallel-size` adds n to the port."""
    bind: bool | None = None
    """Whether to bind the endpoint, whatever its address."""
    replay_endpoint: str | None = None
    """Of the ROUTER socket, which is bound. None: no replay."""
    buffer_steps: int = 10_000
    """Batches that can be replayed, the latest ones."""
    hwm: int = 100_000
    """Batches that wait for one slow subscriber. More are dropped for it."""
    max_queue_size: int = 100_000
    """Batches that wait for the publisher's thread. More are dropped, which leaves a gap in the sequence."""
    topic: str = ""
    block_hashes: str = "int"
    """int: the last 8 bytes of a hash as an unsigned number; bytes: all 32."""

    @property
    def is_on(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"

    @property
    def binds(self) -> bool:
        if self.bind is not None or self.endpoint is None:
            return self.bind is not False
        return (
            "*" in self.endpoint or "::" in self.endpoint or self.endpoint.startswith("ipc://")
        )  # vLLM's rule

    def of_rank(self, rank: int) -> KVEvents:
        """With the endpoints of a replica."""
        endpoints = (self.endpoint or DEFAULT_ENDPOINT, self.replay_endpoint)
        here, replay = (_of_rank(each, rank) if each else None for each in endpoints)
        return replace(self, endpoint=here, replay_endpoint=replay, bind=self.binds)


@dataclass(frozen=True, slots=True)
class KVEventsConfig:
    """What changes in the prefix cache, as a stream for routers that choose the replica with the longest
    prefix."""

    kv_events_config: dict[str, object] = option(
        {},
        "JSON object with vLLM's keys: enable_kv_cache_events, endpoint, replay_endpoint, ... "
        "See kv-events.md.",
        parse=parse_json_object, metavar="JSON",
    )  # fmt: skip
    rank: int = field(default=0)
    """The replica that publishes."""
    restarts: int = field(default=0)
    """How often it was started again. Not a flag."""

    def __post_init__(self) -> None:
        _ = self.events

    @property
    def events(self) -> KVEvents:
        """Raises `ConfigError`."""
        return _read(self.kv_events_config)


_CHECKS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "bool | None": ((bool, type(None)), "true, false or null"),
    "str": ((str,), "a string"),
    "str | None": ((str, type(None)), "a string or null"),
    "int": ((int,), "an integer"),
}
_LEAST = {"buffer_steps": 1, "hwm": 0, "max_queue_size": 1}


def _read(values: Mapping[str, object]) -> KVEvents:
    kinds = {item.name: str(item.type) for item in fields(KVEvents)}
    for key, value in values.items():
        if key not in kinds:
            raise ConfigError(
                f"kv_events_config has no key {key!r}. Keys are {', '.join(sorted(kinds))}."
            )
        types, name = _CHECKS[kinds[key]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ConfigError(f"kv_events_config {key} must be {name}, got {value!r}.")
        if key in _LEAST and isinstance(value, int) and value < _LEAST[key]:
            raise ConfigError(
                f"kv_events_config {key} must be at least {_LEAST[key]}, got {value}."
            )
    events = KVEvents(**values)  # type: ignore[arg-type]
    for key, known in (("publisher", PUBLISHERS), ("block_hashes", HASHES)):
        if getattr(events, key) not in known:
            names = ", ".join(str(name) for name in known if name)
            raise ConfigError(
                f"kv_events_config {key} must be one of {names}, got {getattr(events, key)!r}."
            )
    for key in ("endpoint", "replay_endpoint"):
        endpoint = getattr(events, key)
        if endpoint is not None:
            _check_endpoint(f"kv_events_config {key}", endpoint)
    return events


def _check_endpoint(what: str, endpoint: str) -> None:
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdecimal() and int(port) < 2**16:
        return
    if scheme == "ipc" and rest:
        return
    raise ConfigError(f"{what} must be tcp://HOST:PORT or ipc://PATH, got {endpoint!r}.")


def _of_rank(endpoint: str, rank: int) -> str:
    if not rank:
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}_dp{rank}"
    head, _, port = endpoint.rpartition(":")
    return f"{head}:{int(port) + rank if int(port) else 0}"
