"""Rotations after which pruning takes less: the loss, starting points and the search. No models, no files."""
