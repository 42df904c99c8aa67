"""Heads, FFN channels and width: which groups go, what the rest becomes, and how much each layer loses."""
