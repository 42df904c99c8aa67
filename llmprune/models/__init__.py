"""A checkpoint or an in-memory model, one decoder layer at a time: skeletons, sources, sizes. Knows no recipe."""
