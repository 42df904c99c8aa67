"""The linear map of an MLP's output that best stands for layers which are removed (ReplaceMe, arXiv 2505.02819).

    y = x + m         outputs of the last layer before the run: what does not come from its MLP, and what does
    t                 what is wanted: the outputs of the run's last layer
    x + T m = t       in the least-squares sense, T = I + D:   D = argmin sum_t w_t || t - y - D m ||^2 + a || D ||^2

The ridge pulls T towards the layer as it is, not towards zero. Each token has the weight w_t = 1 / ||t||^2, as in block
matching: the few tokens whose hidden states are hundreds of times larger than all others would rule the sum.
"""

import torch
from torch import Tensor

from llmprune.errors import NumericsError
from llmprune.ranks import Ranks


class LinearMap:
    """Sums of the normal equations, float64 on the device of the rows.

    Args:
        size: hidden size.
        device: of the rows.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._gram)

    def add(self, mlp: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add tokens.

        Args:
            mlp: m, [tokens, hidden], float32.
            outputs: y, likewise.
            targets: t, likewise.
        """
        weight = targets.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        rows, missing = mlp * weight, (targets - outputs) * weight
        self._gram += rows.T @ rows
        self._cross += missing.T @ rows

    def collect(self, ranks: Ranks) -> None:
        """Add the tokens of all processes."""
        for sums in (self._gram, self._cross):
            ranks.total(sums)

    def solve(self, damping: float) -> Tensor:
        """T, float64 [hidden, hidden].

        Args:
            damping: a, relative to the mean of the diagonal of sum_t w_t m m^T; at least 0.

        Raises:
            NumericsError: the sums are not finite, or the fit is not unique with this damping.
        """
        size = len(self._gram)
        eye = torch.eye(size, dtype=torch.float64, device=self._gram.device)
        ridge = damping * self._gram.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(self._gram + ridge * eye)
        if bool(failed) or not bool(factor.isfinite().all()):
            raise NumericsError(
                f"the linear map cannot be fitted with a damping of {damping:g}",
                expected="finite activations of an MLP that use all hidden channels",
                fix="raise structures.depth.damping, or calibrate on more tokens",
            )
        return eye + torch.cholesky_solve(self._cross.T, factor).T
