"""Evaluation: perplexity, lm-eval and latency benches; never imported by the pruning core."""
