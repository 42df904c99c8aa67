"""Rotations that concentrate what pruning scores measure: losses, starting points and the search. No models, no files."""
