"""Every operation the model needs, as plain PyTorch and as C for the CPU.

`quire.kernels.base` holds the `Kernels` protocol, `quire.kernels.select` the choice. This file imports
nothing, so that naming the package does not load torch.
"""
