"""What training minimises: the distance from the dense model's predictions, or from the text, a part at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from torch.utils.checkpoint import checkpoint

from llmprune.recovery.halves import Halves

# Logits of one chunk of positions, counted as float32; in the backward pass there are a few times as many.
_CHUNK_BYTES = 1 << 26

# The label of positions that are not scored, as in transformers.
UNSCORED = -100


@dataclass(frozen=True, slots=True)
class Distances:
    """Sums over scored positions, in nats.

    Attributes:
        loss: what is minimised; a scalar with a gradient.
        nats: negative log-likelihood of the text; a scalar without one.
    """

    loss: Tensor
    nats: Tensor


class Objective:
    """The loss of a pruned model.

    All logits of a batch never exist at once: a chunk of positions passes the heads of both models, and again in the
    backward pass. A batch of one chunk keeps its logits instead.

    Args:
        student: the model that is trained.
        teacher: the dense model; None only if `kl_weight` is 0.
        kl_weight: share of KL(dense || pruned) in the loss, in [0, 1]; the rest is the cross-entropy of the text.
        autocast: dtype of the heads' products; None: that of the weights.
        chunk_bytes: of the logits that exist at once, counted as float32.
    """

    def __init__(
        self,
        student: Halves,
        teacher: Halves | None,
        kl_weight: float,
        autocast: torch.dtype | None = None,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> None:
        assert teacher is not None or kl_weight == 0, "a KL divergence needs the dense model"
        self.student, self._teacher, self._kl_weight = student, teacher if kl_weight else None, kl_weight
        self._autocast = autocast
        vocabulary = student.model.config.get_text_config().vocab_size
        self._positions = max(1, chunk_bytes // (4 * vocabulary))

    def distances(self, hidden: Tensor, ids: Tensor, labels: Tensor) -> Distances:
        """Score the predictions of a batch.

        Args:
            hidden: the student's hidden states, [sequences, positions, hidden].
            ids: the tokens, [sequences, positions].
            labels: the same, and `UNSCORED` for those whose prediction does not count.
        """
        targets = labels[:, 1:]
        scored = targets != UNSCORED
        parts = [hidden[:, :-1][scored], targets[scored]]
        if self._teacher is not None:
            with torch.no_grad(), self._cast(ids.device):
                parts.append(self._teacher.body(ids)[:, :-1][scored])
        chunks = list(zip(*(part.split(self._positions) for part in parts), strict=True))
        keep = len(chunks) == 1 or not torch.is_grad_enabled()
        sums = [self._chunk(*chunk) if keep else _recomputed(self._chunk, *chunk) for chunk in chunks]
        zero = hidden.sum(dtype=torch.float32) * 0
        loss, nats = (sum(column, zero) for column in zip(*sums, strict=True)) if sums else (zero, zero)
        return Distances(loss, nats.detach())

    def _chunk(self, hidden: Tensor, targets: Tensor, teacher: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss and the negative log-likelihood of some positions, both summed."""
        with self._cast(hidden.device):
            logits = self.student.head(hidden)
        predicted = logits.float().log_softmax(-1)
        nats = nll_loss(predicted, targets, reduction="sum")
        if self._teacher is None or teacher is None:
            return nats, nats
        with torch.no_grad(), self._cast(hidden.device):
            dense = self._teacher.head(teacher).float().log_softmax(-1)
        divergence = kl_div(predicted, dense, reduction="sum", log_target=True)
        if self._kl_weight == 1:
            return divergence, nats.detach()
        return self._kl_weight * divergence + (1 - self._kl_weight) * nats, nats

    def _cast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._autocast, enabled=self._autocast is not None)


def _recomputed(chunk: object, *parts: Tensor) -> tuple[Tensor, Tensor]:
    sums: tuple[Tensor, Tensor] = checkpoint(chunk, *parts, use_reentrant=False)
    return sums
