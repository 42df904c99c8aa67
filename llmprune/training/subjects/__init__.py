"""What is trained: a causal LM on text, or a sequence classifier on labelled texts."""
