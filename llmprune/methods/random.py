"""Random pruning: the baseline that every other method has to beat."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llmprune.methods.method import Selection
from llmprune.patterns import Scope
from llmprune.statistics import ColumnNorm, Gram


@dataclass(frozen=True)
class Random(Selection):
    """Uniformly random scores.

    Attributes:
        seed: any integer. It is combined with a hash of the weights, so that matrices of the same shape get different
            masks.
    """

    seed: int = 0
    needs: ClassVar[None] = None
    scope: ClassVar[Scope] = "matrix"

    def scores(self, weight: Float[Tensor, "out in"], statistics: ColumnNorm | Gram | None) -> Float[Tensor, "out in"]:
        """Uniform in [0, 1), reproducible from the seed and the weights, the same on every device."""
        # torch's CPU generator uses only 32 bits of its seed, so both are hashed into 32 bits.
        content = weight.detach().cpu().contiguous().numpy().data
        generator = torch.Generator().manual_seed(zlib.crc32(content, zlib.crc32(str(self.seed).encode())))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
