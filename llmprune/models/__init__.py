"""A checkpoint or a model in memory as decoder layers that come one at a time: skeletons, sources, sizes."""
