"""GPUs as their makers and sellers describe them: `devices.json`, with dates and sources.

Two traps. A data sheet's TFLOP/s are often those of sparse matrices, twice the dense ones; the table has the
dense ones. And a GPU of "80 GB" has 79.6 GiB, one of "48 GB" 45.0: the table has what the driver reports.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from quire.errors import ConfigError

FILE = Path(__file__).with_name("devices.json")


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    title: str
    memory_bytes: int
    bandwidth: float
    """Of its memory, bytes a second."""
    bf16: float
    """FLOP a second, dense."""
    fp8: float | None
    """The same; None: it has no fp8."""
    link: float
    """Bytes a second from the other GPUs of a machine."""
    price: float
    """Dollars an hour."""
    prices: tuple[float, float]
    """The least and the most that the sources name."""
    date: str


def gpu_names(*, every: bool = True) -> list[str]:
    """every: those too on which Quire does not run yet."""
    return [name for name, row in _table()["gpus"].items() if every or row.get("runs", True)]


def sources() -> dict[str, str]:
    return dict(_table()["sources"])


def find_gpu(name: str, *, price: float | None = None) -> Gpu:
    """name: in any case, or an alias. price: dollars an hour, not the table's. Raises `ConfigError`."""
    table = _table()
    wanted = name.lower().replace("_", "-").removeprefix("nvidia-").removeprefix("amd-")
    names = {alias: key for key, row in table["gpus"].items() for alias in (key, *row["aliases"])}
    if wanted not in names:
        close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        known = " or ".join(dict.fromkeys(names[each] for each in close)) or ", ".join(gpu_names())
        raise ConfigError(f"gpu {name!r} is not in the table of GPUs; try {known}.")
    key = names[wanted]
    row = table["gpus"][key]
    low, usual, high = row["price"]
    found = Gpu(
        name=key,
        title=row["title"],
        memory_bytes=row["memory_mib"] << 20,
        bandwidth=row["bandwidth"] * 1e9,
        bf16=row["bf16"] * 1e12,
        fp8=row["fp8"] and row["fp8"] * 1e12,
        link=row["link"] * 1e9,
        price=usual,
        prices=(low, high),
        date=table["date"],
    )
    if price is None:
        return found
    if not 0.0 < price < float("inf"):
        raise ConfigError(f"price must be positive dollars an hour of one GPU, got {price}.")
    return replace(found, price=price)


def parse_gpus(text: str) -> tuple[str, int | None]:
    """ "h100:2" -> ("h100", 2); "h100" -> ("h100", None). Raises `ConfigError`."""
    name, colon, count = text.strip().partition(":")
    if not colon:
        return name, None
    if not count.isdecimal() or not 1 <= int(count) <= 64:
        raise ConfigError(f"gpu {text!r}: the number after the colon must be from 1 to 64.")
    return name, int(count)


@cache
def _table() -> dict:  # type: ignore[type-arg]  # the shape of devices.json, which a test checks
    return json.loads(FILE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
