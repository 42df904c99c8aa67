"""Kernels: each has a plain torch reference, which is its definition, and a Triton implementation for GPUs."""
