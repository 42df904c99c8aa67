"""Bundled recipes: one YAML file each."""
