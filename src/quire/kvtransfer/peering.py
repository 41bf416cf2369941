"""A rank's part in exchanging KV with other instances: what it holds for them, what it fetches from them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from quire.config import KVTransfer
from quire.distributed.hello import listen, read_key, require_key
from quire.kvtransfer import shared
from quire.kvtransfer.export import ExportStore, Memory, PrivateMemory, Tickets
from quire.kvtransfer.peer_client import PeerClient
from quire.kvtransfer.peer_server import PeerServer
from quire.kvtransfer.share import KVShare
from quire.kvtransfer.wire import KEY_VARIABLE


@dataclass(slots=True)
class Peering:
    port: int | None
    """For `KVSource.ports`; None if it holds nothing for others."""
    exports: ExportStore | None
    peers: PeerClient | None
    server: PeerServer | None
    """Ends with `exports`."""

    def close(self) -> None:
        """Idempotent."""
        for part in (self.peers, self.exports):
            if part is not None:
                part.close()


def key_of(transfer: KVTransfer) -> bytes:
    """Raises `ConfigError`, also if there is none and other machines may connect."""
    key, place = read_key(transfer.key_file, KEY_VARIABLE), transfer.listen or transfer.kv_ip
    if transfer.produces and not place.startswith("unix:"):
        require_key(place, key, KEY_VARIABLE)
    return key


def create_peering(
    transfer: KVTransfer,
    share: KVShare,
    fingerprint: bytes,
    *,
    key: bytes,
    engine_id: str,
    rank: int = 0,
    ranks: int = 1,
) -> Peering:
    """Begins to listen if the instance holds KV for others. key: `key_of`. engine_id: the same at all ranks.
    rank: of `ranks`, in the order of `KVSource.ports`. Raises `ConfigError`."""
    memory, to_listen = CONNECTORS[transfer.kv_connector]
    peering = Peering(None, None, None, None)
    if transfer.consumes:
        peering.peers = PeerClient(
            allowed=transfer.admits,
            key=key,
            engine_id=engine_id,
            rank=rank,
            ranks=ranks,
            share=share,
            fingerprint=fingerprint,
            lease=transfer.lease_seconds,
        )
    if transfer.produces:
        listener, peering.port = to_listen(transfer, key, rank)
        peering.exports = ExportStore(
            Tickets(key, engine_id),
            block_bytes=share.block_bytes,
            max_bytes=transfer.kv_buffer_size,
            memory=memory,
            lease=transfer.lease_seconds,
        )
        peering.server = PeerServer(
            listener,
            peering.exports,
            key=key,
            engine_id=engine_id,
            share=share,
            fingerprint=fingerprint,
        )
    return peering


def _tcp(transfer: KVTransfer, key: bytes, rank: int) -> tuple[socket.socket, int]:
    listener = listen(
        transfer.listen or transfer.kv_ip,
        transfer.kv_port and transfer.kv_port + rank,
        key,
        KEY_VARIABLE,
        fields=("kv_ip", "kv_port"),
    )
    return listener, listener.getsockname()[1]


def _unix(transfer: KVTransfer, key: bytes, rank: int) -> tuple[socket.socket, int]:
    port = transfer.kv_port + rank
    return shared.listen(transfer.kv_ip.removeprefix("unix:"), port), port


Listen = Callable[[KVTransfer, bytes, int], tuple[socket.socket, int]]
CONNECTORS: dict[str, tuple[Callable[[int], Memory], Listen]] = {
    "TCPConnector": (PrivateMemory, _tcp),
    "SharedMemoryConnector": (shared.SharedMemory, _unix),
}
"""The memory that holds KV, and how to listen. NIXL's would be memory that is registered for RDMA."""
