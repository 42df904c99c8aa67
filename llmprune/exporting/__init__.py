"""Checkpoints in forms that other programs read."""
