"""Rotations that concentrate pruning scores: losses, starting points and the search. No models, no files."""
