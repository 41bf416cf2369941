"""Muon (Jordan et al., 2024) in fp32: momentum whose matrices are made nearly orthogonal.

`torch.optim.Muon` does this in bf16, which on a processor without bf16 instructions takes longer than
the forward and backward pass together. Matrices of one shape go through the products at once.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
STEPS = 5
EPS = 1e-7


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [count, rows, columns] with their singular values brought near 1."""
    a, b, c = COEFFICIENTS
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """For the two-dimensional weights inside the layers. Steps are as large as AdamW's would be."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                update = orthogonal(torch.stack([self._momentum(p, group) for p in params]))
                for p, part in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(part, alpha=rate)

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov's: the gradient, led on by its running mean."""
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p)
        mean: Tensor = state["mean"].lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(mean, group["momentum"])
