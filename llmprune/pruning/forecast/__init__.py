"""What a run would do and what it would need, before it starts."""
