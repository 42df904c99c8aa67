"""Bundled recipes: one YAML file for each run that somebody may want to repeat."""
