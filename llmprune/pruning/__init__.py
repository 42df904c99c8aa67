"""A run from recipe to report: the only room that puts structures, methods and streams together."""
