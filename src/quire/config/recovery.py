"""Options of a server whose engine core dies or hangs."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.options import option
from quire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RecoveryConfig:
    """When an engine core is started again, and when that is given up."""

    max_core_deaths: int = option(
        3,
        "Deaths of an engine core within --core-death-window with which the server gives up and exits. "
        "Before that the core is started again and its requests go on. 1: the first death ends the server.",
    )
    core_death_window: float = option(600.0, "Seconds in which its deaths are counted.")
    core_hang_timeout: float = option(
        300.0,
        "Seconds without an answer from an engine core, within a step or between two, after which it is "
        "killed, which counts as a death. 0: never. It must be longer than the longest step.",
    )
    poison_refusal_seconds: float = option(
        600.0,
        "Seconds for which a request is refused that has made an engine core die, and its like: same "
        "prompt, same parameters.",
    )

    def __post_init__(self) -> None:
        if self.max_core_deaths < 1:
            raise ConfigError(
                f"max_core_deaths must be at least 1 (no restart), got {self.max_core_deaths}."
            )
        for name in ("core_death_window", "core_hang_timeout", "poison_refusal_seconds"):
            if not getattr(self, name) >= 0:  # so written, NaN fails too
                raise ConfigError(f"{name} must be at least 0 seconds, got {getattr(self, name)}.")
