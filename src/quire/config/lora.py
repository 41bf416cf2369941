"""Options of LoRA adapters."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from quire.config.options import option
from quire.errors import ConfigError

ADAPTER_NAME = re.compile(r"\w[\w.:-]{0,127}(?:/\w[\w.:-]{0,127})?", re.ASCII)
"""As in "sql" and "owner/sql-v2". No part begins with a dot."""
MAX_RANK = 512


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """An adapter that is served from the start."""

    name: str
    path: str
    base_model_name: str | None = None


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """Adapters: small changes to the model, which requests choose by name."""

    enable_lora: bool = option(False, "Serve LoRA adapters beside the model.")
    lora_modules: tuple[str, ...] = option(
        (),
        "Adapters served from the start: name=directory, or a JSON object with name, path and "
        "base_model_name. A request chooses one with `model: name`.",
    )
    lora_dir: tuple[str, ...] = option(
        (),
        "Directories of adapters. A request for an unknown model is served by the adapter in the "
        "subdirectory of that name, and /v1/load_lora_adapter reads only below these directories.",
    )
    max_loras: int = option(8, "Most adapters that running requests use at once.")
    max_cpu_loras: int | None = option(
        None,
        "Most adapters in memory; others are read when a request needs them. At least max_loras. "
        "Default: 4 times max_loras.",
    )
    max_lora_rank: int = option(
        64, f"Largest rank of an adapter, 1 to {MAX_RANK}. It costs nothing by itself."
    )

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_loras", 1, 1 << 20),
            ("max_lora_rank", 1, MAX_RANK),
            ("max_cpu_loras", self.max_loras, 1 << 20),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name} must be from {least} to {most}, got {value}.")
        if not self.enable_lora:
            for name in ("lora_modules", "lora_dir"):
                if getattr(self, name):
                    raise ConfigError(f"{name} needs enable_lora (--enable-lora).")
        names = [module.name for module in self.modules]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"lora_modules has the name {name!r} twice.")

    @property
    def modules(self) -> list[AdapterModule]:
        """`lora_modules`, read. Raises `ConfigError` for one that is malformed."""
        return [read_module(text) for text in self.lora_modules]

    @property
    def capacity(self) -> int:
        """Most adapters in memory."""
        return 4 * self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras


def read_module(text: str) -> AdapterModule:
    """`name=path` or a JSON object."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError:
            found = {}
    else:
        name, _, path = text.partition("=")
        found = {"name": name, "path": path}
    known = {"name", "path", "base_model_name"}
    ok = not found.keys() - known and found.get("name") and found.get("path")
    if not ok or not all(isinstance(value, str) for value in found.values() if value is not None):
        raise ConfigError(
            "lora_modules takes name=directory, or a JSON object with name, path and perhaps "
            f"base_model_name, got {text!r}."
        )
    if not ADAPTER_NAME.fullmatch(found["name"]):
        raise ConfigError(
            "the name of an adapter has 1 to 128 letters, digits and _ . : -, or two such parts with / "
            f"between them, got {found['name']!r}."
        )
    return AdapterModule(found["name"], found["path"], found.get("base_model_name"))
