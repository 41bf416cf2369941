"""The choice of the kernels on a CPU."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from quire.errors import ConfigError
from quire.kernels.base import Kernels, LayerKernels
from quire.kernels.cpu.build import BuildError, hash_of_sources
from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.native import NativeKernels
from quire.kernels.cpu.tiles import choose_tiles
from quire.kernels.reference import ReferenceKernels

KernelsName = Literal["auto", "native", "reference"]

logger = logging.getLogger("quire.kernels")


def create_kernels(name: KernelsName = "auto", *, activation_bits: int = 16) -> Kernels:
    """The kernels by that name; `auto` is native where a C compiler works, else the reference.

    activation_bits: 8 also for formats that say 16 (`CodeFormat.activation_bits`).

    Raises `ConfigError` for `native` when it cannot be built, and for an unknown name.
    """
    if name == "reference":
        return ReferenceKernels(activation_bits=activation_bits)
    if name not in ("auto", "native"):
        raise ConfigError(f"kernels={name!r} is not known; use 'auto', 'native' or 'reference'")
    try:
        kernels = NativeKernels(activation_bits=activation_bits)
        logger.info("CPU kernels: %s", describe_native())
        return kernels
    except BuildError as error:
        if name == "native":
            raise ConfigError(
                f"kernels='native' cannot be built: {error}; install a C compiler, set CC to one, "
                "or use kernels='reference'"
            ) from error
        logger.warning("no native CPU kernels (%s); the slower reference serves", error)
        return ReferenceKernels(activation_bits=activation_bits)


def describe_native() -> str:
    """The instructions that the compiled kernels use, and why. Raises `BuildError`."""
    vectors = load_library().quire_vectors()
    bits = 32 * (vectors % 256)
    dots = " with bfloat16 dot products" if vectors >= 256 else ""
    return f"{bits}-bit vectors{dots}; {choose_tiles().reason}"


def numerics_of(kernels: LayerKernels) -> str:
    """Equal where results are equal, bit for bit, as far as that is known without computing."""
    if kernels.device.type == "cuda":
        where = torch.cuda.get_device_name(kernels.device)
    elif isinstance(kernels, NativeKernels):
        where = f"{describe_native()}, sources {hash_of_sources().hexdigest()}"
    else:
        where = torch.backends.cpu.get_cpu_capability()
    return f"{kernels.name}, PyTorch {torch.__version__}, {where}"
