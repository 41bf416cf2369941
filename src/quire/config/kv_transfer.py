"""Prefill/decode disaggregation: `--kv-transfer-config` with vLLM's keys.

KV that does not arrive is computed, so no value changes a token. Who may be asked for KV is decided here
(`KVTransfer.admits`), and not by a client's request.
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from quire.config.kv import FAILURE_POLICIES
from quire.config.options import option, parse_json_object, parse_size
from quire.errors import ConfigError

CONNECTORS = ("TCPConnector", "SharedMemoryConnector")
ROLES = ("kv_producer", "kv_consumer", "kv_both")
MAX_RANKS = 64
DEFAULT_PORT = 14579
"""vLLM's."""

_TIERS = "set --kv-offloading-size, and --kv-disk-path for a disk"
_PULL = "use TCPConnector, or SharedMemoryConnector on one machine"
_NO_RDMA = f"it needs RDMA, for which there is no transport yet; {_PULL}"
NOT_HERE: Mapping[str, str] = {
    "NixlConnector": _NO_RDMA,
    "NixlPullConnector": _NO_RDMA,
    "NixlPushConnector": _NO_RDMA,
    "P2pNcclConnector": _PULL,
    "PyNcclConnector": _PULL,
    "MooncakeConnector": _PULL,
    "MoRIIOConnector": _PULL,
    "MooncakeStoreConnector": f"for a cache on this machine {_TIERS}; for another instance's {_PULL}",
    "FlexKVConnectorV1": _TIERS,
    "HF3FSKVConnector": _TIERS,
    "HiSparseConnector": _TIERS,
    "LMCacheConnector": _TIERS,
    "LMCacheConnectorV1": _TIERS,
    "LMCacheMPConnector": _TIERS,
    "OffloadingConnector": _TIERS,
    "SimpleCPUOffloadConnector": _TIERS,
    "SharedStorageConnector": _TIERS,
    "ExampleConnector": _TIERS,
    "ExampleHiddenStatesConnector": "hidden states are not served",
    "DecodeBenchConnector": "see bench/disaggregation.py",
    "MultiConnector": f"name one connector; for tiers beside it {_TIERS}",
}
"""vLLM's connectors that Quire lacks, and what to use instead."""
IDLE_KEYS = frozenset(
    {"kv_buffer_device", "kv_rank", "kv_parallel_size", "enable_permute_local_kv"}
)
"""They are accepted and have no effect: KV is staged in host memory, ranks follow from the other options."""
EXTRA_KEYS = ("peers", "key_file", "lease_seconds", "listen")
"""The keys of `kv_connector_extra_config`."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An instance that may be asked for KV: HOST, HOST:PORT, NETWORK/BITS, NETWORK/BITS:PORT or unix:PATH."""

    host: str
    port: int | None
    """Of its first rank; the others follow. None: any."""

    @classmethod
    def parse(cls, text: str) -> Peer:
        if text.startswith("unix:"):
            return cls(text, None)
        host, colon, port = text.rpartition(":")
        if not colon or "]" in port or (":" in host and not host.endswith("]")):
            host, port = text, ""  # no port; a bare IPv6 address has colons of its own
        if (colon and host != text and not _is_port(port)) or not host.strip("[]"):
            raise ConfigError(
                f"kv_transfer_config peers: {text!r} is no HOST:PORT, NETWORK/BITS:PORT or unix:PATH."
            )
        host = host.strip("[]").lower()
        if "/" in host:
            try:
                ipaddress.ip_network(host)
            except ValueError as error:
                raise ConfigError(f"kv_transfer_config peers: {text!r}: {error}.") from None
        return cls(host, int(port) if port else None)

    def admits(self, host: str, ports: Sequence[int]) -> bool:
        if host.startswith("unix:") or self.host.startswith("unix:"):
            return host == self.host
        if self.port is not None and list(ports) != [self.port + i for i in range(len(ports))]:
            return False
        host = host.strip("[]").lower()
        if "/" not in self.host:
            return host == self.host
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(self.host)
        except ValueError:
            return False


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text[:6]) < 2**16


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """How KV is exchanged with other instances. The fields are the keys that have an effect, those of
    `kv_connector_extra_config` included."""

    kv_connector: str
    kv_role: str
    engine_id: str | None = None
    """Names this instance in answers. None: random, another one after each start."""
    kv_ip: str = "127.0.0.1"
    """Where other instances find this one: an address or name, or unix:PATH for SharedMemoryConnector."""
    kv_port: int = DEFAULT_PORT
    """Of the first rank; rank i listens on the i-th port after it, over all replicas."""
    kv_buffer_size: int = 2**30
    """Bytes of each rank for KV that others fetch."""
    kv_load_failure_policy: str | None = None
    """None: as `--kv-load-failure-policy`."""
    listen: str | None = None
    """Address to listen on, if it is not `kv_ip`."""
    peers: tuple[str, ...] = ()
    """The instances whose KV is read; see `Peer`."""
    key_file: str | None = None
    """The key that all instances share. None: the variable QUIRE_KV_KEY."""
    lease_seconds: float = 30.0
    """How long KV is held for an instance that does not say that it still wants it."""
    _peers: tuple[Peer, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_peers", tuple(map(Peer.parse, self.peers)))

    @property
    def produces(self) -> bool:
        return self.kv_role != "kv_consumer"

    @property
    def consumes(self) -> bool:
        return self.kv_role != "kv_producer"

    def admits(self, host: str, ports: Sequence[int]) -> bool:
        """Whether KV may be asked for there. ports: of the instance's ranks, in order."""
        return any(peer.admits(host, ports) for peer in self._peers)


@dataclass(frozen=True, slots=True)
class KVTransferConfig:
    """KV that other instances compute (prefill/decode disaggregation). Off by default."""

    kv_transfer_config: dict[str, object] = option(
        {},
        "JSON object with vLLM's keys: kv_connector (TCPConnector, SharedMemoryConnector), "
        "kv_role (kv_producer, kv_consumer, kv_both), kv_ip, kv_port, ... See disaggregation.md.",
        parse=parse_json_object, metavar="JSON",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _ = self.transfer

    @property
    def transfer(self) -> KVTransfer | None:
        """What the option says; None: nothing is exchanged. Raises `ConfigError`."""
        given = {key: value for key, value in self.kv_transfer_config.items() if value is not None}
        return _transfer(given) if given else None

    def of_replica(self, index: int, ranks: int) -> KVTransferConfig:
        """For one of several replicas, of so many ranks each: with ports and a name of its own."""
        transfer = self.transfer
        if transfer is None:
            return self
        values = {**self.kv_transfer_config, "kv_port": transfer.kv_port + index * ranks}
        if transfer.engine_id is not None:
            values["engine_id"] = f"{transfer.engine_id}-{index}"
        return KVTransferConfig(values)


_CHECKS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "kv_connector": (lambda v: _text(v), "a name"),
    "kv_role": (lambda v: v in ROLES, f"one of {', '.join(ROLES)}"),
    "engine_id": (lambda v: _text(v) and len(str(v)) <= 256, "a text of 1 to 256 characters"),
    "kv_ip": (lambda v: _text(v), "an address of this machine"),
    "kv_port": (lambda v: _between(v, 1, 65535 - MAX_RANKS) and isinstance(v, int), "a port"),
    "kv_buffer_size": (lambda v: _between(v, 1, 2**50), "a number of bytes, or a text like 4G"),
    "kv_load_failure_policy": (lambda v: v in FAILURE_POLICIES, "recompute or fail"),
    "kv_connector_extra_config": (lambda v: isinstance(v, dict), "an object"),
    "listen": (lambda v: _text(v), "an address of this machine"),
    "peers": (
        lambda v: isinstance(v, list | tuple) and all(map(_text, v)),
        "a list of HOST:PORT",
    ),
    "key_file": (lambda v: _text(v), "a path"),
    "lease_seconds": (lambda v: _between(v, 1, 3600), "a number of 1 to 3600"),
}


def _text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _between(value: object, low: float, high: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and low <= value <= high  # type: ignore[operator]


def _transfer(values: dict[str, object]) -> KVTransfer:
    if "kv_connector_module_path" in values:
        raise ConfigError(
            "kv_transfer_config kv_connector_module_path is not supported: the server runs no code of "
            f"others. Connectors are {', '.join(CONNECTORS)}."
        )
    own = {item.name for item in fields(KVTransfer)} - {"_peers", *EXTRA_KEYS}
    known = _checked(values, (*own, "kv_connector_extra_config", *IDLE_KEYS), "kv_transfer_config")
    extra = known.pop("kv_connector_extra_config", {})
    assert isinstance(extra, dict)
    given = {key: value for key, value in extra.items() if value is not None}
    known |= _checked(given, EXTRA_KEYS, "kv_transfer_config kv_connector_extra_config")
    for name in ("kv_connector", "kv_role"):
        if name not in known:
            raise ConfigError(f"kv_transfer_config needs {name}: {_CHECKS[name][1]}.")
    connector = str(known["kv_connector"])
    if connector not in CONNECTORS:
        why = NOT_HERE.get(connector, f"connectors are {', '.join(CONNECTORS)}")
        raise ConfigError(f"kv_transfer_config kv_connector {connector!r} is not supported: {why}.")
    known["peers"] = tuple(known.get("peers", ()))  # type: ignore[arg-type]
    made = KVTransfer(**{key: known[key] for key in known if key not in IDLE_KEYS})  # type: ignore[arg-type]
    if made.kv_role == "kv_consumer" and not made.peers:
        raise ConfigError(
            "kv_transfer_config with kv_role kv_consumer needs kv_connector_extra_config "
            '{"peers": ["HOST:PORT"]}: the kv_ip and kv_port of the instances whose KV it may read.'
        )
    if made.produces and (why := _unreachable(made)):
        raise ConfigError(f"kv_transfer_config kv_ip {made.kv_ip!r} {why}.")
    return made


def _unreachable(transfer: KVTransfer) -> str:
    """Why other instances do not find this one at its `kv_ip`."""
    is_path = transfer.kv_ip.startswith("unix:")
    if transfer.kv_connector == "SharedMemoryConnector":
        return "" if is_path else "must be unix:PATH, in a directory of your own"
    if is_path:
        return "is for SharedMemoryConnector; use an address of this machine"
    if transfer.kv_ip.strip("[]") in ("0.0.0.0", "::", "*"):
        return (
            "is no address at which others find this instance: use one that is, and in "
            'kv_connector_extra_config {"listen": "0.0.0.0"} to listen on all'
        )
    return ""


def _checked(values: Mapping[str, object], names: Sequence[str], where: str) -> dict[str, object]:
    """`values`, if they are among `names` and of the right kind."""
    checked = {}
    for key, value in values.items():
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Keys are {', '.join(sorted(names))}."
            raise ConfigError(f"{where} has no key {key!r}. {hint}")
        if key == "kv_buffer_size" and isinstance(value, str):
            try:
                value = parse_size(value)
            except ConfigError as error:
                raise ConfigError(f"{where} {key}: {error}") from None
        if key in _CHECKS and not _CHECKS[key][0](value):
            raise ConfigError(f"{where} {key} must be {_CHECKS[key][1]}, got {value!r}.")
        checked[key] = int(value) if key == "kv_buffer_size" else value  # type: ignore[call-overload]
    return checked
