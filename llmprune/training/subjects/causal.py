"""A causal LM, trained on text as `llmprune recover` does: in two halves, the loss a chunk of positions at a time."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.measuring.perplexity import compare_perplexity, finite, run_stream
from llmprune.models.checkpoint_source import CheckpointSource, open_checkpoint
from llmprune.progress import Watcher
from llmprune.recovery.counting import stored_dtypes
from llmprune.recovery.halves import Halves
from llmprune.recovery.objective import UNSCORED, Objective
from llmprune.recovery.options import RecoveryOptions
from llmprune.recovery.result import load_whole, write_result
from llmprune.recovery.texts import read_evaluation, read_training, training_spec
from llmprune.recovery.training import first_half_only, rows_of, scored_in
from llmprune.stream.stream import StreamSettings
from llmprune.text.loading import tokenizer_for
from llmprune.text.tokens import TextSpec
from llmprune.training.subjects.subject import Row, Subject


class CausalSubject(Subject):
    """A causal LM and its text.

    Args:
        folder: its checkpoint.
        text: that is trained on.
        evaluation: on which perplexity is measured in the end; None: it is not.
        options: of the training.
        device: where it is trained.
        autocast: dtype of products; None: float32.
    """

    measure = "perplexity"

    def __init__(
        self,
        folder: Path,
        text: TextSpec,
        evaluation: TextSpec | None,
        options: RecoveryOptions,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.folder, self.options, self.device = folder, options, device
        self._spec, self._evaluation, self._autocast = text, evaluation, autocast
        self.source = CheckpointSource(folder, torch.float32)
        self.model = self.source.model
        texts = [text, *([evaluation] if evaluation else [])]
        self.tokenizer = tokenizer_for(texts, folder, self.source.config)

    def read(self, watch: Watcher) -> None:
        """Read the text, all of it unless a number of sequences is given, and that for the evaluation."""
        spec = training_spec(self._spec, self.source, self.device)
        tokens = read_training(spec, self.source, self.tokenizer, self.device, watch)
        self.rows, self.digest, self.text = rows_of(tokens), tokens.digest, tokens.description
        if self._evaluation is not None:
            self._measured = read_evaluation(self._evaluation, self.source, self.tokenizer, self.device, watch)

    def load(self, device: torch.device, *, teacher: bool) -> None:
        """Read the weights."""
        load_whole(self.source, device)
        dense = None
        if teacher:
            original = open_checkpoint(self.folder, device)
            load_whole(original, device)
            dense = Halves(original.model)
        self._objective = Objective(Halves(self.model), dense, self.options.kl_weight, self._autocast)

    def session(self) -> AbstractContextManager[None]:
        """In which the model returns hidden states."""
        return first_half_only(self._objective)

    def loss(self, outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
        """The KL divergence from the checkpoint's model, the cross-entropy of the text, or a mix."""
        distances = self._objective.distances(outputs["hidden"], outputs["ids"], labels)
        return distances.loss, scored_in(labels)

    def early_loss(self, rows: Sequence[Row], temperature: float) -> Tensor:
        """The cross-entropy of the text."""
        ids, labels = (torch.stack([row[key] for row in rows]).to(self.device) for key in ("input_ids", "labels"))
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float() / temperature
        return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=UNSCORED)

    def score(self, outputs: Any, labels: Tensor) -> tuple[float, int]:
        """Negative log-likelihoods, in nats."""
        distances = self._objective.distances(outputs["hidden"], outputs["ids"], labels)
        return distances.nats.item(), scored_in(labels)

    def quality(self, mean: float) -> float:
        """Perplexity."""
        return math.exp(mean) if mean < 700 else math.inf

    def write(self, target: Path, watch: Watcher) -> None:
        """Write it as its checkpoint is stored."""
        write_result(self.source, target, watch)

    def stored_dtypes(self) -> Mapping[str, torch.dtype]:
        """Those of the checkpoint."""
        return stored_dtypes(self.source)

    @property
    def evaluates(self) -> bool:
        """Whether there is a text to evaluate on."""
        return self._evaluation is not None

    def evaluate(self, result: Path, watch: Watcher) -> dict[str, Any]:
        """Measure both by the protocol of `llmprune perplexity`."""
        settings = StreamSettings(self.device)
        sources = [open_checkpoint(folder, self.device) for folder in (self.folder, result)]
        tokens = self._measured
        streams = [
            run_stream(source, tokens.ids, settings, watch, f"{name} perplexity")
            for source, name in zip(sources, ("dense", "pruned"), strict=True)
        ]
        compared = compare_perplexity(streams[0], streams[1], tokens, watch)
        before, after = compared.dense.perplexity, compared.pruned.perplexity
        return {"evaluation": compared.to_dict(), "before": finite(before), "after": finite(after)}
