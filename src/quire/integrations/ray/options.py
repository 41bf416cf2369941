"""The options of the application: those of `quire serve`, and where and how often its model runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from quire.config import EngineConfig, ServerConfig, engine_options, server_options, split_flat
from quire.config.flat import canonical, load_yaml
from quire.config.foreign import without_foreign
from quire.config.options import OptionInfo, check_type, describe, option, parse_text
from quire.errors import ConfigError

LISTENING = ("host", "port", "uds", "root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs",
             "admin_host", "admin_port", "admin_uds")  # fmt: skip
"""Options of a listener. Here Serve's proxies listen."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What Serve needs to know. A config file's `deployments` may set more: autoscaling_config, ..."""

    num_replicas: int = option(1, "Copies of the model; with max_replicas, the fewest.")
    max_replicas: int | None = option(
        None, "Most copies. Serve adds some while requests wait, and removes idle ones."
    )
    target_ongoing_requests: float | None = option(
        None,
        "Requests per copy, running or waiting, above which a copy is added. Default: max_num_seqs, so that "
        "one is added when requests wait.",
    )
    max_ongoing_requests: int | None = option(
        None,
        "Most requests that a copy is sent. Others wait in the ingress, and go to the first copy with room. "
        "Default: 1.25 x max_num_seqs.",
    )
    num_cpus: float | None = option(
        None, "Cores of each copy, and threads of its engine. Default: cpu_threads, or 1."
    )
    num_gpus: float | None = option(
        None, "GPUs of each copy. Default: one per rank with device cuda, else none."
    )
    ingress_replicas: int = option(
        1, "Processes that choose copies. Each knows only which prompts it has sent where."
    )

    def __post_init__(self) -> None:
        for name in ("num_replicas", "max_ongoing_requests", "ingress_replicas"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ConfigError(
                f"max_replicas must be at least num_replicas ({self.num_replicas}), "
                f"got {self.max_replicas}."
            )
        if self.target_ongoing_requests is not None and not self.target_ongoing_requests > 0:
            raise ConfigError(
                f"target_ongoing_requests must be above 0, got {self.target_ongoing_requests}."
            )
        for name in ("num_cpus", "num_gpus"):
            if (amount := getattr(self, name)) is not None and not amount >= 0:
                raise ConfigError(f"{name} must be at least 0, got {amount}.")


@dataclass(frozen=True, slots=True)
class AppConfig:
    serve: ServeOptions
    engine: EngineConfig
    server: ServerConfig
    values: dict[str, object]
    """The options that `engine` and `server` were made of. A replica makes them again."""
    notes: list[str]
    """Warnings about options of vLLM that have no effect."""


def read(args: Mapping[str, object]) -> AppConfig:
    """Check all options. `config` names a YAML file of more of them. Raises `ConfigError`."""
    given = dict(args)
    path = given.pop("config", None)
    if path is not None:
        given = load_yaml(str(path)) | given
    given = canonical({name.replace("-", "_"): value for name, value in given.items()})
    of_serve = {info.name: info for info in describe(ServeOptions, "ray")}
    of_quire = {info.name: info for info in (*engine_options(), *server_options())}
    given, notes = without_foreign(given)
    known = of_serve | of_quire
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown option {name}.{hint}")
        if name in LISTENING:
            raise ConfigError(
                f"{name} has no effect on Ray: Serve's proxies listen (http_options and route_prefix of "
                "the Serve config). Leave it out."
            )
    values = {name: _parsed(known[name], value) for name, value in given.items()}
    serve_values = {
        name: check_type(of_serve[name], values.pop(name)) for name in of_serve if name in values
    }
    serve = ServeOptions(**serve_values)  # type: ignore[arg-type]
    if max(serve.num_replicas, serve.max_replicas or 1) > 1:
        # A response is stored by the replica that made it; another one would not find it.
        if values.get("max_stored_responses"):
            raise ConfigError("max_stored_responses must be 0 with several replicas.")
        values["max_stored_responses"] = 0
    if values.get("cpu_threads") is None and (serve.num_cpus or 1) >= 1:
        values["cpu_threads"] = int(serve.num_cpus or 1)
    engine, server = split_flat(values)
    return AppConfig(serve, engine, server, values, notes)


def _parsed(info: OptionInfo, value: object) -> object:
    """`serve run` passes text for everything; a config file passes values."""
    if not isinstance(value, str) or info.is_list:
        return value
    if info.is_bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value if info.is_bool else parse_text(info, value)
