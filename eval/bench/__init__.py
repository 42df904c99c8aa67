"""Benchmarks: scripts that first check correctness and then print medians with their spread."""
