"""The config.json of the smaller model, checked against its tensors, and the cost of running it."""
