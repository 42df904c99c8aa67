"""The generated parts of the documentation, each a function that returns Markdown."""
