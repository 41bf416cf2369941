"""From the configuration to a rank's store and the scheduler's connector."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable

from quire.config import EngineConfig, KVTransferConfig
from quire.dtypes import element_bytes
from quire.kvtransfer.base import KVMemory, Store, Tier
from quire.kvtransfer.connector import StoreConnector
from quire.kvtransfer.fingerprint import Fingerprint
from quire.kvtransfer.mover import Mover
from quire.kvtransfer.share import KVShare, share_of
from quire.messages import KVSource
from quire.models.spec import ModelSpec

FLUSH_SECONDS = 2.0
"""With a disk: what closing may take to write what is on its way there."""
INDEX_SECONDS = 0.25
"""With a disk: what starting may wait until all on it is found, so that the first request misses nothing.
What takes longer is found while requests run."""


def create_store(
    config: EngineConfig,
    model: ModelSpec,
    fingerprint: Fingerprint,
    *,
    kv_cache_dtype: str,
    rank: int,
    memory: KVMemory,
) -> Mover:
    """A rank's. model: its part. kv_cache_dtype: resolved. Raises `ConfigError`."""
    layout, shape = model.kv, model.heads
    heads = model.layers[0].attention.own_heads(model.share)[1]
    share = share_of(
        layout, heads, memory.block_bytes // (2 * layout.layers_per_page * shape.num_kv_heads)
    )
    tiers = _create_tiers(config, fingerprint, share, rank, element_bytes(kv_cache_dtype))
    flush = FLUSH_SECONDS if config.kv_tiers.disk_bytes else 0.0
    transfer = config.kv_transfer.transfer
    if transfer is None:
        return Mover(memory, tiers, flush_seconds=flush)
    from quire.kvtransfer.peering import create_peering, key_of

    assert transfer.engine_id is not None, "named() first"
    peering = create_peering(
        transfer,
        share,
        fingerprint.model,
        key=key_of(transfer),
        engine_id=transfer.engine_id,
        rank=rank,
        ranks=config.parallel.world_size,
    )
    return Mover(
        memory,
        tiers,
        peers=peering.peers,
        exports=peering.exports,
        server=peering.server,
        flush_seconds=flush,
    )


def _create_tiers(
    config: EngineConfig, fingerprint: Fingerprint, share: KVShare, rank: int, size: int
) -> list[Tier]:
    """size: bytes of an element."""
    options, parallel = config.kv_tiers, config.parallel
    tiers: list[Tier] = []
    if not options.has_tiers:
        return tiers
    from quire.kvtransfer.codec import Codec, find_compressor

    ram_bytes = options.ram_bytes(parallel.world_size)
    both = bool(ram_bytes and options.disk_bytes)
    codec = Codec(size, find_compressor(), repeats=both)
    if ram_bytes:
        from quire.kvtransfer.ram import RamTier

        tiers.append(RamTier(ram_bytes, codec))
    if options.disk_bytes:
        from quire.kvtransfer.disk import DiskTier

        assert options.kv_disk_path is not None
        here = parallel.world_size // parallel.nnodes
        disk = DiskTier(
            options.kv_disk_path,
            options.disk_bytes // (here * parallel.data_parallel_size),
            fingerprint=fingerprint.local,
            share=repr((share.layers, share.heads)),
            block_bytes=share.block_bytes,
            codec=codec,
            also_others=rank % here == 0,
        )
        disk.wait_indexed(INDEX_SECONDS)
        tiers.append(disk)
    return tiers


def named(config: EngineConfig) -> EngineConfig:
    """With a name for this instance, the same at all its ranks, if it exchanges KV with others."""
    transfer = config.kv_transfer.transfer
    if transfer is None or transfer.engine_id is not None:
        return config
    values = {**config.kv_transfer.kv_transfer_config, "engine_id": secrets.token_hex(8)}
    return dataclasses.replace(config, kv_transfer=KVTransferConfig(values))


def create_connector(
    config: EngineConfig, store: Callable[[], Store | None]
) -> StoreConnector | None:
    """None if nothing is configured. config: `named`. store: of the sampling rank; None while it sleeps."""
    transfer = config.kv_transfer.transfer
    if not config.moves_kv:
        return None
    held_at = None
    if transfer is not None and transfer.produces:
        assert transfer.engine_id is not None, "named() first"
        held_at = KVSource(
            engine_id=transfer.engine_id,
            host=transfer.kv_ip,
            ports=tuple(range(transfer.kv_port, transfer.kv_port + config.parallel.world_size)),
            ticket="",
            num_tokens=0,
        )
    return StoreConnector(
        store,
        block_size=config.cache.block_size,
        policy=config.kv_tiers.kv_write_policy if config.kv_tiers.has_tiers else None,
        fetches=transfer is not None and transfer.consumes,
        held_at=held_at,
    )
