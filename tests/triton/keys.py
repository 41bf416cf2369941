"""The variants of kernels that launches need, found while the kernels are interpreted: a GPU compiles one for
each. The rules are Triton's own (`native_specialize_impl`)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelParam

Variant = tuple[str, tuple[str, ...]]
"""A kernel's name, and each argument as its code depends on it."""


class Variants:
    """Notes the variant of each launch."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: dict[Variant, int] = {}
        run = InterpretedFunction.run

        def noted(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
            variant = variant_of(kernel, arguments, named)
            self.seen[variant] = self.seen.get(variant, 0) + 1
            return run(kernel, *arguments, grid=grid, warmup=warmup, **named)

        patch.setattr(InterpretedFunction, "run", noted)

    def since(self, known: set[Variant]) -> list[str]:
        """Those that are not known, each with its arguments that differ from the most similar known one."""
        return [_difference(variant, known) for variant in self.seen if variant not in known]


def variant_of(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Variant:
    signature = inspect.signature(kernel.fn)
    bound = signature.bind(
        *arguments, **{k: v for k, v in named.items() if k in signature.parameters}
    )
    bound.apply_defaults()
    plain = _of(kernel, "do_not_specialize")
    unaligned = _of(kernel, "do_not_specialize_on_alignment")
    words = []
    for number, (name, value) in enumerate(bound.arguments.items()):
        here = {name, number}
        parameter = KernelParam(
            number, signature.parameters[name], bool(here & plain), bool(here & unaligned)
        )
        if parameter.is_constexpr:
            words.append(f"{name}={value}")
            continue
        found = native_specialize_impl(
            CUDABackend,
            value,
            parameter.is_const,
            not parameter.do_not_specialize,
            not parameter.do_not_specialize_on_alignment,
        )
        words.append(f"{name}: {found}")
    options = {k: v for k, v in named.items() if k not in signature.parameters}
    return kernel.fn.__qualname__, (*words, *(f"{k}={v}" for k, v in sorted(options.items())))


def _of(kernel: Any, option: str) -> set[object]:
    return set(kernel.kwargs.get(option) or ())


def _difference(variant: Variant, known: set[Variant]) -> str:
    name, words = variant
    like = [set(words) - set(other) for of, other in known if of == name]
    return f"{name}: {sorted(min(like, key=len)) if like else 'never launched before'}"
