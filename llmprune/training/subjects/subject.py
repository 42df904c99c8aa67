"""What `llmprune train` asks of a model and its text, whatever both are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.progress import Watcher
from llmprune.recovery.options import RecoveryOptions

Row = dict[str, Tensor]


class Subject(ABC):
    """A model that is trained, and its text.

    Attributes:
        folder: its checkpoint.
        model: on the meta device until it is loaded.
        options: of the training.
        device: where it is trained.
        measure: what its quality is called: "perplexity" or "accuracy".
        rows: sequences to train on, then those that are held back.
        digest: of all of them, sha256.
        text: facts about them.
    """

    measure: str
    folder: Path
    model: PreTrainedModel
    options: RecoveryOptions
    device: torch.device
    rows: list[Row]
    digest: str
    text: Mapping[str, Any]

    @abstractmethod
    def read(self, watch: Watcher) -> None:
        """Read the text into `rows`, and what `evaluate` needs: it must not be found missing after training.

        Raises:
            CalibrationError: it cannot be read, or is too short.
        """

    @abstractmethod
    def load(self, device: torch.device, *, teacher: bool) -> None:
        """Read the weights, in float32, onto a device; with a teacher, a second copy that stays as it is."""

    @abstractmethod
    def session(self) -> AbstractContextManager[None]:
        """In which the model is called by the Trainer."""

    @abstractmethod
    def loss(self, outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
        """What is minimised on a batch: its sum, with a graph, and over how many it goes.

        Args:
            outputs: of the model.
            labels: of the rows.
        """

    @abstractmethod
    def early_loss(self, rows: Sequence[Row], temperature: float) -> Tensor:
        """The mean cross-entropy of some rows with logits divided by a temperature: a scalar with a graph."""

    @abstractmethod
    def score(self, outputs: Any, labels: Tensor) -> tuple[float, int]:
        """The sum, over what is scored of a batch, of what quality is computed from, and how many are scored."""

    @abstractmethod
    def quality(self, mean: float) -> float:
        """The quality from the mean of `score`."""

    @abstractmethod
    def write(self, target: Path, watch: Watcher) -> None:
        """Write the trained model, in the dtype of its checkpoint.

        Raises:
            CheckpointError: it cannot be written.
        """

    @abstractmethod
    def stored_dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype in which each parameter is written."""

    @abstractmethod
    def evaluate(self, result: Path, watch: Watcher) -> dict[str, Any]:
        """Measure the checkpoint and the result on the text for that.

        Returns:
            Entries of the report: "before" and "after", and more.
        """

    @property
    @abstractmethod
    def evaluates(self) -> bool:
        """Whether there is a text for that."""

    @property
    def held_back(self) -> int:
        """How many of the rows are held back."""
        return self.options.kept_back(len(self.rows))

    @property
    def token_count(self) -> int:
        """Tokens of a row, padding included."""
        return int(self.rows[0]["input_ids"].numel())
