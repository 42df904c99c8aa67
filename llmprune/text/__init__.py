"""From documents, or a model's self-generated text, to calibration tokens."""
