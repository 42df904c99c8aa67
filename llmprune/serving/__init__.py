"""Load and run packed checkpoints: transformers' loader, layers that call kernels, the HTTP server. Never prunes."""
