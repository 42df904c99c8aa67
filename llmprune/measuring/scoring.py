"""What a model's next-token distributions are scored by, summed up over any number of positions.

The mean negative log-likelihood m = L / N of all tokens is a ratio of two sums over sequences. Tokens of one sequence
depend on one another, so the standard error takes sequences, not tokens, as independent draws: with L_s and n_s those
of sequence s of S, it is sqrt(S / (S - 1) * sum_s (L_s - m n_s)^2) / N (the ratio estimator of Cochran 1977, Sampling
Techniques, section 6.4). With equal n_s it is the usual standard error of the mean of the sequences.
Two models that read the same sequences find the same ones hard, so the standard error of the difference of their means
is that of the paired losses: the same formula, with the difference of both L_s in the place of L_s.

The expected calibration error (ECE) measures how far a model's confidence is from its accuracy (Guo et al. 2017, On
Calibration of Modern Neural Networks, section 2): predictions fall into 15 bins of equal width by the probability of
the most likely next token, bin m has (m - 1) / 15 < confidence <= m / 15, and |accuracy - mean confidence| is averaged
over the bins, weighted by their number of predictions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.ranks import Ranks
from llmprune.stream.variants import kl_divergences

_BINS = 15


class Scores:
    """Sums for one model.

    Args:
        sequences: how many there are in all.

    Attributes:
        nats: negative log-likelihood of all tokens so far.
    """

    def __init__(self, sequences: int) -> None:
        self.nats = 0.0
        self._losses, self._counts = torch.zeros(2, sequences, dtype=torch.float64)
        self._bins: Tensor | None = None

    def add(self, log_probabilities: Tensor, targets: Tensor, sequences: Tensor) -> None:
        """Count predictions.

        Args:
            log_probabilities: [positions, vocabulary].
            targets: [positions], the tokens that follow.
            sequences: [positions], the number of the sequence that each is in.
        """
        losses = -log_probabilities.gather(-1, targets.unsqueeze(-1)).double().squeeze(-1)
        self.nats += float(losses.sum())
        # On the CPU, where sums by index always run in the same order.
        places = sequences.cpu()
        self._losses += torch.bincount(places, losses.cpu(), minlength=len(self._losses))
        self._counts += torch.bincount(places, minlength=len(self._counts))
        self._calibrate(log_probabilities, targets)

    def collect(self, ranks: Ranks) -> None:
        """Add what the other processes have scored."""
        for sums in (self._losses, self._counts):
            ranks.total(sums)
        self.nats = sum(ranks.gather(self.nats))
        bins = [found for found in ranks.gather(self._bins) if found is not None]
        self._bins = torch.stack(bins).sum(0) if bins else None

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean negative log-likelihood per token; None with fewer than two sequences."""
        return _stderr(self._losses, self._counts)

    def difference_stderr(self, other: "Scores") -> float | None:
        """Standard error of the difference of both means, paired by sequences; None with fewer than two sequences.

        Args:
            other: another model's scores of the same tokens.
        """
        return _stderr(other._losses - self._losses, self._counts)

    def over(self, sequences: Tensor) -> "Scores":
        """The sums over some of the sequences, whose numbers these are; without a calibration error."""
        part = Scores(len(self._losses))
        part._losses[sequences], part._counts[sequences] = self._losses[sequences], self._counts[sequences]
        part.nats = float(part._losses.sum())
        return part

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error; a bin's weight cancels the count that its means are divided by."""
        if self._bins is None:
            return None
        hits, confidences = self._bins
        return float((hits - confidences).abs().sum() / self._counts.sum())

    def _calibrate(self, log_probabilities: Tensor, targets: Tensor) -> None:
        confidence, likeliest = log_probabilities.max(-1)
        confidence = confidence.double().exp().clamp(max=1.0)
        bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
        values = torch.stack([(likeliest == targets).double(), confidence])
        # A matmul, because scatter additions on a GPU run in a different order each time.
        sums = values @ F.one_hot(bins, _BINS).double()
        self._bins = sums if self._bins is None else self._bins + sums


def _stderr(losses: Tensor, counts: Tensor) -> float | None:
    """Standard error of the mean loss per token, from each sequence's sum and its number of tokens."""
    count, sequences = float(counts.sum()), int((counts > 0).sum())
    if sequences < 2:
        return None
    residuals = losses - float(losses.sum()) / count * counts
    return math.sqrt(sequences / (sequences - 1) * float(residuals.square().sum())) / count


class Differences:
    """How far one model's predictions are from another's, by sequence.

    Args:
        sequences: how many there are in all.

    Attributes:
        divergence: sum of KL(first || second) so far, in nats.
        same: positions so far whose most likely next token is the same.
    """

    def __init__(self, sequences: int) -> None:
        self.divergence, self.same = 0.0, 0
        self._divergences, self._same = torch.zeros(2, sequences, dtype=torch.float64)

    def add(self, first: Tensor, second: Tensor, sequences: Tensor) -> None:
        """Count positions.

        Args:
            first: log-probabilities [positions, vocabulary].
            second: likewise.
            sequences: [positions], the number of the sequence that each is in.
        """
        divergences, same = kl_divergences(first, second), first.argmax(-1) == second.argmax(-1)
        self.divergence += float(divergences.sum())
        self.same += int(same.sum())
        # On the CPU, as in `Scores`.
        places = sequences.cpu()
        self._divergences += torch.bincount(places, divergences.cpu(), minlength=len(self._divergences))
        self._same += torch.bincount(places, same.double().cpu(), minlength=len(self._same))

    def collect(self, ranks: Ranks) -> None:
        """Add what the other processes have compared."""
        for sums in (self._divergences, self._same):
            ranks.total(sums)
        self.divergence, self.same = sum(ranks.gather(self.divergence)), sum(ranks.gather(self.same))

    def over(self, sequences: Tensor) -> tuple[float, int]:
        """The divergence and the number of same tokens in some of the sequences."""
        return float(self._divergences[sequences].sum()), int(self._same[sequences].sum())
