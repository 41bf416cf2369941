"""The seconds of a step, as `quire bench fit` has measured and fitted them on one device.

    seconds = curve(rows + prompt_tokens) + rows * row + contexts * context
              + prompt_contexts * prompt_context + (prompt_step, if there are tokens of prompts)

The curve is linear between its sizes and never falls: a step waits for the weights while it has few tokens,
and computes once it has many. One formula serves all steps, since products do not distinguish the tokens of
prompts from those of rows, and the time of attention is added.

`quire.plan` predicts with it, and an engine may start from it (`--cost-model`).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from quire.errors import ConfigError
from quire.scheduler.cost_model import Work

FORMAT = 1
_NUMBERS = ("row", "context", "prompt_context", "prompt_step", "request_seconds", "token_seconds")


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Raises `ConfigError` if a number makes no sense."""

    is_bound: ClassVar[bool] = False
    sizes: tuple[float, ...]
    """Numbers of tokens, ascending."""
    curve: tuple[float, ...]
    """Seconds at them."""
    row: float = 0.0
    context: float = 0.0
    prompt_context: float = 0.0
    prompt_step: float = 0.0
    request_seconds: float = 0.0
    """Of a request, outside of steps: from its arrival until a step may have it, and from a step's end until
    the caller has the token."""
    token_seconds: float = 0.0
    """Of each token that is sampled, outside of steps."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Mean relative error of steps that were not fitted, by kind: decode, prefill, mixed, all."""
    about: Mapping[str, object] = field(default_factory=dict)
    """Where it was measured: model, device, processor, versions, commit, date, command."""
    _slopes: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or len(self.sizes) != len(self.curve):
            raise ConfigError(
                "sizes and curve must have the same number of entries, 2 at least; they have "
                f"{len(self.sizes)} and {len(self.curve)}."
            )
        if any(low >= high for low, high in pairwise(self.sizes)) or self.sizes[0] < 0:
            raise ConfigError(f"sizes must ascend from 0 or more, got {list(self.sizes)}.")
        if any(low > high for low, high in pairwise(self.curve)) or not self.curve[0] >= 0:
            raise ConfigError(f"curve must be positive and never fall, got {list(self.curve)}.")
        if not 0 < self.curve[-1] < float("inf"):
            raise ConfigError(f"curve must end in a positive number, got {self.curve[-1]}.")
        for name in _NUMBERS:
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be at least 0 seconds, got {getattr(self, name)}.")
        pairs = zip(pairwise(self.sizes), pairwise(self.curve), strict=True)
        slopes = [(top - bottom) / (high - low) for (low, high), (bottom, top) in pairs]
        object.__setattr__(self, "_slopes", (*slopes, slopes[-1]))

    def seconds(self, work: Work) -> float:
        """Beyond the curve's ends it is continued in a line."""
        rows, contexts, _, prompts, prompt_contexts = work
        tokens = rows + prompts
        at = max(0, bisect_right(self.sizes, tokens) - 1)
        seconds = self.curve[at] + self._slopes[at] * (tokens - self.sizes[at])
        seconds += rows * self.row + contexts * self.context
        if prompts:
            seconds += prompt_contexts * self.prompt_context + self.prompt_step
        return seconds if seconds > 0.0 else 0.0

    # --- files ----------------------------------------------------------------------------------------

    def content(self) -> dict[str, object]:
        """For a file, ready for `json.dumps`."""
        values = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        return {"quire_cost": FORMAT} | values

    @classmethod
    def load(cls, path: str | Path) -> FittedCost:
        """Raises `ConfigError`, which names the file and what is wrong with it."""
        try:
            return cls.parse(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cost file {path}: {error.strerror or error}.") from None
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"cost file {path}: {error}") from None

    def numbers(self) -> str:
        """As a file's content, without where it was measured."""
        return json.dumps(replace(self, about={}, errors={}).content())

    @classmethod
    def parse(cls, text: str) -> FittedCost:
        """The content of a file."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError("it is not JSON; make it with quire bench fit.") from None
        return cls._read(content)

    @classmethod
    def _read(cls, content: object) -> FittedCost:
        if not isinstance(content, dict) or content.get("quire_cost") != FORMAT:
            raise ConfigError(f"it needs quire_cost: {FORMAT}; make it with quire bench fit.")
        names = set(cls.__dataclass_fields__) - {"_slopes"}
        unknown = sorted(content.keys() - names - {"quire_cost"})
        if unknown:
            raise ConfigError(f"unknown fields {', '.join(map(repr, unknown))}.")
        missing = {"sizes", "curve", *_NUMBERS} - content.keys()
        if missing:
            raise ConfigError(f"fields {', '.join(sorted(missing))} are missing.")
        errors, about = content.get("errors", {}), content.get("about", {})
        if not isinstance(about, dict) or not isinstance(errors, dict):
            raise ConfigError("errors and about must be objects.")
        return cls(
            _numbers("sizes", content["sizes"]),
            _numbers("curve", content["curve"]),
            **{name: _number(name, content[name]) for name in _NUMBERS},
            errors={str(name): _number("errors", value) for name, value in errors.items()},
            about=about,
        )


def _numbers(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(f"{name} must be a list of numbers, got {values!r}.")
    return tuple(_number(name, value) for value in values)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}.")
    return float(value)
