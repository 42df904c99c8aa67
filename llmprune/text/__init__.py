"""From documents to calibration tokens, and text that a model generates itself."""
