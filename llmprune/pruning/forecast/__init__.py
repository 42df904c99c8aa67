"""What a run would do and what it would need, before it starts. Reads headers and one layer of each kind."""
