"""Benchmark a checkpoint against dense weights on this machine. Measures time and memory, never quality."""
