"""Physically remove heads, channels, experts, layers and hidden width. The steps are the rooms inside."""
