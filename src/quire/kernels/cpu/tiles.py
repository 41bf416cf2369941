"""Which tiles (tiles.h) a process computes bfloat16 with: AMX where processor and system have it.

A row's bits are the same for every batch because all products of a dtype go one way. So the choice is made
once a process, and for all of them.
"""

from __future__ import annotations

import functools
import logging
import os
from enum import IntEnum
from typing import NamedTuple

from quire.errors import ConfigError
from quire.kernels.cpu import library

VARIABLE = "QUIRE_CPU_TILES"
"""`auto`; `off`: vectors instead; `plain`: the tiles' arithmetic in plain C, slow, to test without AMX."""


class Tiles(IntEnum):
    """Mirrors enum tiles in kernels.h."""

    NONE = 0
    AMX = 1
    PLAIN = 2


class TileChoice(NamedTuple):
    tiles: Tiles
    reason: str


def choose_tiles() -> TileChoice:
    """Raises `BuildError` with no compiler, and `ConfigError` for another value of the variable.

    AMX is compared with plain C on a small product and a small attention, which takes about a millisecond. If
    they disagree by more than rounding, a warning is logged and AMX is not used.
    """
    return _choose(os.environ.get(VARIABLE, "auto"))


@functools.cache
def _choose(wanted: str) -> TileChoice:
    if wanted == "off":
        return TileChoice(Tiles.NONE, f"no tiles, by {VARIABLE}")
    if wanted == "plain":
        return TileChoice(Tiles.PLAIN, f"tiles in plain C, by {VARIABLE}")
    if wanted != "auto":
        raise ConfigError(f"{VARIABLE}={wanted!r} is not known; use 'auto', 'off' or 'plain'")
    lib = library.load_library()
    refusal = lib.quire_ask_for_amx()
    if refusal == 1:
        return TileChoice(Tiles.NONE, "no AMX")
    if refusal:
        return TileChoice(Tiles.NONE, "no AMX: the system refuses it to this process")
    verdict = lib.quire_check_tiles(Tiles.AMX)
    if verdict == 0:
        return TileChoice(Tiles.AMX, "AMX, bit for bit as plain C")
    if verdict == 1:
        return TileChoice(Tiles.AMX, "AMX, as plain C up to rounding")
    logging.getLogger("quire.kernels").warning(
        "AMX gives wrong results on this machine and is not used; products take several times as long. "
        "Please report the output of `quire collect-env`"
    )
    return TileChoice(Tiles.NONE, "no AMX: its results are wrong")
