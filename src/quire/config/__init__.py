"""Configuration: frozen dataclasses, one field per flag (`engine.py`, `server.py`), built from flat
names (`flat.py`), resolved once against the model (`quire.engine.setup`)."""

from quire.config.engine import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    StructuredOutputsConfig,
)
from quire.config.flat import (
    canonical,
    engine_options,
    from_flat,
    load_yaml,
    server_from_flat,
    server_options,
    split_flat,
)
from quire.config.foreign import foreign_flags, without_foreign
from quire.config.kv import KVTiersConfig
from quire.config.kv_transfer import KVTransfer, KVTransferConfig
from quire.config.lora import ADAPTER_NAME, LoRAConfig
from quire.config.parallel import ParallelConfig
from quire.config.recovery import RecoveryConfig
from quire.config.server import ServerConfig
from quire.config.speculative import Speculation, SpeculativeConfig

__all__ = [
    "ADAPTER_NAME",
    "CacheConfig",
    "EngineConfig",
    "KVTiersConfig",
    "KVTransfer",
    "KVTransferConfig",
    "LoRAConfig",
    "ModelConfig",
    "ParallelConfig",
    "RecoveryConfig",
    "RuntimeConfig",
    "SchedulerConfig",
    "ServerConfig",
    "Speculation",
    "SpeculativeConfig",
    "StructuredOutputsConfig",
    "canonical",
    "engine_options",
    "foreign_flags",
    "from_flat",
    "load_yaml",
    "server_from_flat",
    "server_options",
    "split_flat",
    "without_foreign",
]
