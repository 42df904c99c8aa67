"""How fast a checkpoint is here: each packed product beside the dense one, tokens a second, memory, and tuning."""
