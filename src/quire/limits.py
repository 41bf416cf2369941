"""Limits that no request may exceed, whatever a server's options say. vLLM's numbers where it has them.

In a file of their own, so that a command line can show them without importing `sampling_params`."""

from __future__ import annotations

MAX_N = 16384
MAX_STOP_STRINGS = 256
MAX_BAD_WORDS = 1024
MAX_TIMEOUT = 86400.0
"""Seconds."""
