"""Weight formats, from the `quant_method` of a config to the module that knows it, imported only when asked
for. Adding one is one file with `read_config(config) -> LinearMethod`, and one line here. Torch-free."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from quire.quantization.base import LinearMethod

METHODS: dict[str, str] = {}
"""quant_method in the config -> module."""


def read_method(config: Mapping[str, object]) -> LinearMethod | None:
    """What a `quantization_config` says; None where its method is not known.

    Raises `UnsupportedModelError` as the method's module does.
    """
    name = config.get("quant_method")
    module = METHODS.get(name) if isinstance(name, str) else None
    if module is None:
        return None
    method: LinearMethod = importlib.import_module(module).read_config(config)
    return method
