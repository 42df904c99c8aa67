"""How much the tokens of a calibration text count in the statistics."""

# No `from __future__ import annotations`: jaxtyping reads the shapes at run time.
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

TokenWeight = Literal["none", "clip", "normalise"]
LossWeight = Literal["none", "tokens"]

# Where clipped tokens are clipped: at this many times the usual root mean square.
_CLIP = 2.0


@dataclass(slots=True)
class TokenWeighting:
    """Weighs the tokens of one input before they enter its statistics.

    A few tokens, such as BOS, carry activations that are hundreds of times larger than all others (Sun et al. 2024,
    Massive Activations in Large Language Models, arXiv 2402.17762). In sums of squares nothing else counts: the solver
    then serves a handful of tokens whose outputs hardly matter.

    Attributes:
        kind: "none"; "clip": tokens above twice the usual root mean square are scaled down to it; "normalise": every
            token is scaled to a root mean square of 1.
        usual: median root mean square of the first sequence, where clipping needs it; the same for every batch size.
    """

    kind: TokenWeight = "none"
    usual: float | None = None

    def __call__(
        self, rows: Float[Tensor, "tokens width"], energies: Float[Tensor, " tokens"], first: int
    ) -> Float[Tensor, "tokens width"]:
        """Scale rows, in their dtype.

        Args:
            rows: the inputs.
            energies: mean square of each row, float32.
            first: how many of the rows belong to the first sequence, if these are the first rows.
        """
        if self.kind == "none" or not len(rows):
            return rows
        sizes = energies.sqrt()
        if self.kind == "normalise":
            factors = 1 / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
        else:
            if self.usual is None:
                self.usual = float(sizes[:first].median())
            factors = (_CLIP * self.usual / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)).clamp_max(1.0)
        return (rows.float() * factors[:, None]).to(rows.dtype)
