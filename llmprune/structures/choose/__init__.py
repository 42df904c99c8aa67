"""Which groups to remove: scores, searches and budgets. Changes no weight."""
