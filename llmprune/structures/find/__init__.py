"""Find the structures: traced through the data flow of a model without weights, never inferred from names."""
