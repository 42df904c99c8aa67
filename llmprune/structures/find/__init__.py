"""Where the structures are: traced through the data flow of a skeleton, never told from names."""
