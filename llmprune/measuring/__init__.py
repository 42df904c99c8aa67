"""What came of a run: perplexity, speed, size and sparsity. Never imports structures."""
