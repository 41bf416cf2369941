"""`quire quantize MODEL OUT`: writes a quantized checkpoint that Quire, vLLM and transformers read.

In the order of a run: `plan` says what each tensor becomes, `write` rounds and writes, `compare` measures
what it cost, and `command` has the flags and prints.
"""

from quire.cli.quantize.command import run

__all__ = ["run"]
