"""Remove groups from weights: refit what is kept, cut the tensors. The solver depends on neither models nor files."""
