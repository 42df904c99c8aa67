"""From documents, or self-generated text, to calibration tokens. Knows tokenizers and models, not recipes."""
