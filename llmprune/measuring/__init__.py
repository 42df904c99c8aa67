"""Measurements of a checkpoint: perplexity, speed, size and sparsity. Never imports structures."""
