"""`llmprune rotate`: a checkpoint that computes the same, with weights that can be pruned with less loss."""
