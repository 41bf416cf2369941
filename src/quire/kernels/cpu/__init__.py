"""C kernels for the CPU: sources beside this file, compiled on first use."""
