"""Weight formats: from the `quant_method` of a config to its module, which is imported when it is needed.
A new format is one file with `read_config(config) -> LinearMethod`, and one line here. Torch-free."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from quire.quantization.base import LinearMethod

METHODS: dict[str, str] = {
    "gguf": "quire.quantization.gguf",
}
"""quant_method in the config -> module."""


def read_method(config: Mapping[str, object]) -> LinearMethod | None:
    """The method of a `quantization_config`; None if it is unknown.

    Raises `UnsupportedModelError` as the method's module does.
    """
    name = config.get("quant_method")
    module = METHODS.get(name) if isinstance(name, str) else None
    if module is None:
        return None
    method: LinearMethod = importlib.import_module(module).read_config(config)
    return method
