"""Benches: scripts that check correctness first and then print medians with their spread."""
