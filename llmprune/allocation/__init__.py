"""Allocation: how sparse each matrix becomes while the model's number of zeros stays the same; pure functions."""
