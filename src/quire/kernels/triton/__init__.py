"""Kernels for GPUs, written in Triton, and the functions that launch them.

This package imports nothing, so that it can be imported without Triton: import the modules. `attention`
is paged attention, `layers` has the operations between matrix products, `batch` keeps a step's inputs on
the device, `sampling` chooses tokens, and `tuning` has the shapes of tiles.

A launch function takes tensors on the device and launches kernels. It never waits for the device, and its
grid depends on shapes and integers of the host only, so that it can be captured in a CUDA graph.
"""
