"""The config.json of the smaller model, checked against its tensors, and what it costs to run."""
