"""Prune while training: masks that change with the steps, on the user's own loop, the Trainer, or `llmprune train`."""
