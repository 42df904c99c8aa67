"""Grid search: one run for every combination of settings, resumable."""
