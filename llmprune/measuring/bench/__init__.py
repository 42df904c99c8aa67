"""Benchmark a checkpoint against dense weights on this machine."""
