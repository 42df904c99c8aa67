"""Packed checkpoints in memory and in use: transformers' loader, kernels behind linear layers, the HTTP server."""
