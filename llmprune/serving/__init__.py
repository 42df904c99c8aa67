"""Loading and running packed checkpoints: transformers' loader, linear layers that call kernels, the HTTP server."""
