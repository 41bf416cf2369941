"""The operations of a model: plain PyTorch, C for the CPU, Triton for GPUs.

`quire.kernels.base` holds the `Kernels` protocol, `quire.kernels.select` the choice. This file imports
nothing, so that naming the package does not load torch.
"""
