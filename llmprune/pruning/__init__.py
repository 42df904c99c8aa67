"""A run from recipe to report: the only package that combines structures, methods and streams."""
