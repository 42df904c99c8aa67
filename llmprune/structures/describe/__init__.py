"""The config.json of the smaller model, checked against its tensors, and its cost. Reads shapes, not weights."""
