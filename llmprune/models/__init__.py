"""A checkpoint or an in-memory model, served one decoder layer at a time: skeletons, sources, sizes."""
