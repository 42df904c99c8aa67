"""Train what is left: weights of a pruned model, whose zeros stay zero."""
