"""Take groups out of weights: solve for what stays, cut the tensors. The solver knows neither models nor files."""
