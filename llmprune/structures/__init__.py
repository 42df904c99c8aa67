"""Remove heads, channels, experts, layers and hidden width physically: found, chosen, solved, cut and described."""
