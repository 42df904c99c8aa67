"""What a user asks for: recipes as YAML, mappings and command-line overrides, checked and explained."""
