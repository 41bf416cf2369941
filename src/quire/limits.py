"""What no request may exceed, whatever a server is told to allow. vLLM's numbers where it has them.

Apart from `sampling_params`, so that a command line can show them without importing it."""

from __future__ import annotations

MAX_N = 16384
MAX_STOP_STRINGS = 256
MAX_BAD_WORDS = 1024
