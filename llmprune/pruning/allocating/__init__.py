"""Allocating: the streamed passes that an allocation needs, and the decision that follows from them."""
