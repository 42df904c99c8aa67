"""Which positions' logits are computed at once, so that those of a large vocabulary fit into memory.

The logits of 16,384 positions over Gemma's vocabulary of 262,144 take 17 GB as float32, far more than a decoder layer.
Everything a causal LM does after its last layer (norm, head, scaling, soft-capping) is done to each position by itself,
so the positions can be taken a few at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from llmprune.models.source import Source

# Limit on one model's logits in memory, counted as float32, in which they are compared; half of that in 16 bits.
LOGIT_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Window:
    """Some of a batch's samples, whole, or some positions of one sample.

    Attributes:
        batch: number of the batch.
        shape: (samples, length) of the batch.
        samples: which samples.
        positions: which of their positions.
    """

    batch: int
    shape: tuple[int, int]
    samples: slice
    positions: slice

    def cut(self, values: Tensor) -> Tensor:
        """This window's part, a view, of something that the batch has for each position.

        Args:
            values: [..., samples, length, ...], for which `can_cut` holds.
        """
        if self.is_whole:
            return values
        before = (slice(None),) * _places(values, self.shape)[0]
        return values[(*before, self.samples, self.positions)]

    def can_cut(self, values: Tensor) -> bool:
        """Whether it is clear which dimensions of a tensor are the samples and their positions."""
        return self.is_whole or len(_places(values, self.shape)) == 1

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole batch."""
        return (self.samples, self.positions) == tuple(slice(0, size) for size in self.shape)


def windows(batch: int, shape: tuple[int, int], most: int) -> Iterator[Window]:
    """Split a batch into windows, in order.

    Args:
        batch: its number.
        shape: its (samples, length).
        most: positions in a window, >= 1.
    """
    samples, length = shape
    together = max(min(most // length, samples), 1)
    # Equal parts: a remainder of one position would be multiplied by another kernel, which rounds differently.
    step = -(-length // -(-length // most))
    for first in range(0, samples, together):
        for start in range(0, length, step):
            ends = min(first + together, samples), min(start + step, length)
            yield Window(batch, shape, slice(first, ends[0]), slice(start, ends[1]))


def window_positions(source: Source, limit_bytes: int = LOGIT_BYTES) -> int:
    """How many positions' logits fit into a limit, as float32; at least 1."""
    return max(limit_bytes // (4 * source.model.config.get_text_config(decoder=True).vocab_size), 1)


def _places(values: Tensor, shape: tuple[int, int]) -> list[int]:
    """Where (samples, length) may begin among the dimensions: Gemma 3n has its parallel streams before them."""
    return [place for place in range(values.ndim - 1) if tuple(values.shape[place : place + 2]) == shape]
