"""What a user asks for: recipes as YAML, mappings and overrides, checked and explained. Opens no model."""
