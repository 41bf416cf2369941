"""Linear layers: one or more matrices of the checkpoint, multiplied as one.

`quire.quantization` defines how they are stored and multiplied.
"""

from __future__ import annotations

from functools import partial

import torch

from quire.kernels.base import LayerKernels, LinearProduct
from quire.layers.parameter import WeightTarget
from quire.quantization.base import LinearMethod, LinearShape


class Linear:
    """The weights of one product. `bind()` returns the product itself, because in a decode step of a
    small model most of the time is Python calls, and a method in between would double them.
    """

    def __init__(
        self,
        shape: LinearShape,
        *,
        dtype: torch.dtype,
        method: LinearMethod,
        kernels: LayerKernels,
    ) -> None:
        self.shape = shape
        self._state = method.create(shape, dtype=dtype, kernels=kernels)

    def targets(self) -> list[WeightTarget]:
        """The tensors that this layer needs, in the order of its parts."""
        return [
            WeightTarget(
                name=f"{part.name}.{want.suffix}",
                shape=want.shape,
                load=partial(self._state.load, index, want.suffix),
                kind="bias" if want.suffix == "bias" else "weight",
                dtypes=want.dtypes,
                taken=want.taken,
            )
            for index, part in enumerate(self.shape.parts)
            for want in self._state.wants(part)
        ]

    def bind(self) -> LinearProduct:
        """Call once, when every target has been loaded."""
        return self._state.finish()
