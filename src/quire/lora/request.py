"""`LoRARequest`, vLLM's way to name an adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from quire.errors import InvalidParameterError


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """The adapter with which a request of `LLM` or `AsyncLLM` is computed. Two are equal if their names are.

    The adapter is read when it is named first, and is known by its content: two requests with one name and
    different directories get different adapters.
    """

    lora_name: str
    lora_int_id: int = field(compare=False)
    """1 or more. Kept for vLLM's scripts; it identifies nothing."""
    lora_path: str = field(default="", compare=False)
    """The directory that PEFT wrote."""
    base_model_name: str | None = field(default=None, compare=False)
    load_inplace: bool = field(default=False, compare=False)
    """Whether to read the directory again, because its content may have changed."""

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not 1 <= len(self.lora_name) <= 256:
            raise InvalidParameterError(
                f"lora_name must be a text of 1 to 256 characters, got {self.lora_name!r}.",
                param="lora_name",
            )
        if type(self.lora_int_id) is not int or self.lora_int_id < 1:
            raise InvalidParameterError(
                f"id must be > 0, got {self.lora_int_id!r}.", param="lora_int_id"
            )
        if not isinstance(self.lora_path, str | os.PathLike) or not str(self.lora_path):
            raise InvalidParameterError("lora_path cannot be empty.", param="lora_path")

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def path(self) -> str:
        return self.lora_path
