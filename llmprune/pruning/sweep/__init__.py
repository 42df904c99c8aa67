"""Grid search: one run for every combination of settings, resumable. Runs are `pruning.pipeline`'s, to the bit."""
