"""Products over matrices of codes: the sum over the dequantized matrix, and rows of it."""

from __future__ import annotations

import torch

from quire.kernels.codes import CodeFormat
from quire.kernels.dequantize import Scales, dequantize
from quire.kernels.triton.backend import TritonKernels
from tests.kernels.cases import generator, randn


def test_a_stack_of_two_formats() -> None:
    rng = generator(0)
    kernels = TritonKernels(torch.device("cpu"), batch_invariant=True)
    x, ids = randn(3, 40, rng=rng), torch.tensor([4, 0])
    products, expected = [], []
    for form, n in ((CodeFormat(bits=4, group=16, offset="zero"), 5), (CodeFormat(bits=8), 7)):
        codes = torch.randint(1 << form.bits, (n, 40), generator=rng).to(torch.uint8)
        scale = randn(n, form.num_groups(40), rng=rng)
        zero = torch.full_like(scale, 8).to(torch.uint8) if form.offset == "zero" else None
        weight = dequantize(form, codes, Scales(scale, zero))
        product = kernels.codes(
            form, in_features=40, out_features=n, dtype=torch.float32, bias=False
        )
        product.fill_codes(0, 0, codes)
        product.fill_scales(0, Scales(scale, zero))
        torch.testing.assert_close(product.rows(ids), weight[ids])
        products.append(product)
        expected.append(x @ weight.T)
    stack = kernels.stack(products)
    torch.testing.assert_close(stack(x), torch.cat(expected, dim=1), rtol=1e-5, atol=1e-4)
