"""Physically remove heads, channels, experts, layers and hidden width: find, choose, solve, cut and describe."""
