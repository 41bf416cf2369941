"""From flat names (flags, YAML keys, `LLM(...)` keywords) to the frozen configs, strictly."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from quire.config.engine import (
    BY_DEVICE,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    StructuredOutputsConfig,
)
from quire.config.kv import KVTiersConfig
from quire.config.kv_events import KVEventsConfig
from quire.config.kv_transfer import KVTransferConfig
from quire.config.lora import LoRAConfig
from quire.config.options import OptionInfo, check_type, describe
from quire.config.parallel import ParallelConfig
from quire.config.recovery import RecoveryConfig
from quire.config.server import ServerConfig
from quire.config.speculative import SpeculativeConfig
from quire.errors import ConfigError

ENGINE_GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "runtime": RuntimeConfig,
    "structured": StructuredOutputsConfig,
    "speculative": SpeculativeConfig,
    "lora": LoRAConfig,
    "parallel": ParallelConfig,
    "recovery": RecoveryConfig,
    "kv_tiers": KVTiersConfig,
    "kv_transfer": KVTransferConfig,
    "kv_events": KVEventsConfig,
}


def engine_options() -> list[OptionInfo]:
    """Every engine option, in the order of the docs."""
    return [info for group, cls in ENGINE_GROUPS.items() for info in describe(cls, group)]


def server_options() -> list[OptionInfo]:
    return describe(ServerConfig, "server")


def from_flat(values: Mapping[str, object]) -> EngineConfig:
    """Build an `EngineConfig`. Unknown names and wrong types raise `ConfigError`."""
    infos = {info.name: info for info in engine_options()}
    checked = _checked(canonical(values), infos)
    groups: dict[str, dict[str, object]] = {group: {} for group in ENGINE_GROUPS}
    for name, value in checked.items():
        groups[infos[name].group][name] = value
    return EngineConfig(
        **{g: cls(**groups[g]) for g, cls in ENGINE_GROUPS.items()},  # type: ignore[arg-type]
        by_device=tuple(name for name in BY_DEVICE if name not in checked),
    )


def server_from_flat(values: Mapping[str, object]) -> ServerConfig:
    """Build a `ServerConfig`, with the same checks."""
    infos = {info.name: info for info in server_options()}
    return ServerConfig(**_checked(values, infos))  # type: ignore[arg-type]


def split_flat(values: Mapping[str, object]) -> tuple[EngineConfig, ServerConfig]:
    """Build both from one flat mapping, such as all flags of `quire serve`."""
    values = canonical(values)
    server_names = {info.name for info in server_options()}
    server = {name: value for name, value in values.items() if name in server_names}
    engine = {name: value for name, value in values.items() if name not in server_names}
    known = server_names | {info.name for info in engine_options()}
    _reject_unknown(engine, known)
    return from_flat(engine), server_from_flat(server)


def load_yaml(path: str | Path) -> dict[str, object]:
    """Read a `--config` file: a mapping of flag names, with dashes or underscores."""
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"config file {path} is not valid YAML.") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"config file {path} must hold a mapping of option names to values.")
    return {key.replace("-", "_"): value for key, value in loaded.items()}


def canonical(values: Mapping[str, object]) -> dict[str, object]:
    """`values` with an option's other long spelling replaced by its name."""
    names = {
        alias[2:].replace("-", "_"): info.name
        for info in (*engine_options(), *server_options())
        for alias in info.aliases
        if alias.startswith("--")
    }
    renamed = {names.get(name, name): value for name, value in values.items()}
    if len(renamed) < len(values):
        raise ConfigError("an option is given under two names; leave one out.")
    return renamed


def _checked(values: Mapping[str, object], infos: Mapping[str, OptionInfo]) -> dict[str, object]:
    _reject_unknown(values, set(infos))
    return {name: check_type(infos[name], value) for name, value in values.items()}


def _reject_unknown(values: Mapping[str, object], known: set[str]) -> None:
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown option {name}.{hint}")
