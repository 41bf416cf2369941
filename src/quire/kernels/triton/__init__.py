"""Kernels for GPUs, written in Triton, and the functions that launch them.

This package imports nothing, so that naming it costs nothing on a machine without Triton: import the
modules. `attention` is paged attention, `layers` what stands between matrix products, `batch` keeps a
step's inputs on the device, `sampling` ends it; `tuning` holds the shapes of tiles.

A launch function takes tensors on the device and launches; it never waits for the device, and its grid
depends on shapes and host integers alone, so that a CUDA graph can hold it.
"""
