"""A sequence classifier of transformers, trained on labelled texts."""

import copy
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from llmprune.errors import CalibrationError, ModelError, TrainingError
from llmprune.models.boundary import build_classifier, explained, load_classifier, load_tokenizer, read_stock_config
from llmprune.models.checkpoint_source import positive_zeros
from llmprune.models.skeleton import quiet_transformers, refuse_quantised
from llmprune.progress import Progress, Watcher
from llmprune.recovery.options import RecoveryOptions
from llmprune.storage.companions import copy_companions
from llmprune.storage.files import read_index
from llmprune.storage.folders import writing_to
from llmprune.training.subjects.labelled import Example, read_examples
from llmprune.training.subjects.subject import Row, Subject

# Tokens of a text, if neither the user nor the model says.
_LENGTH = 512


def _dtypes(folder: Path) -> tuple[dict[str, torch.dtype], torch.dtype]:
    """The dtypes of a checkpoint's floating tensors by key, and that of most of its bytes."""
    floating = {key: stored for key, stored in read_index(folder).items() if stored.dtype.is_floating_point}
    sizes: Counter[torch.dtype] = Counter()
    for stored in floating.values():
        sizes[stored.dtype] += stored.nbytes
    main = max(sizes, key=sizes.__getitem__, default=torch.float32)
    return {key: stored.dtype for key, stored in floating.items()}, main


class ClassifierSubject(Subject):
    """A sequence classifier and its labelled texts.

    Args:
        folder: its checkpoint.
        text: the file that is trained on.
        evaluation: the file on which accuracy is measured in the end; None: it is not.
        length: of a text in tokens at most; None: what the model allows, at most 512.
        samples: how many texts of the file are used, drawn by the seed of the options; None: all.
        options: of the training.
        device: where it is trained.

    Raises:
        ModelError: it has one output, as a regression has, or several labels at once.
        TrainingError: its tokenizer has no padding token that the model knows.
    """

    measure = "accuracy"

    def __init__(
        self,
        folder: Path,
        text: str,
        evaluation: str | None,
        length: int | None,
        samples: int | None,
        options: RecoveryOptions,
        device: torch.device,
    ) -> None:
        self.folder, self.options, self.device = folder, options, device
        self._source, self._evaluation, self._samples = text, evaluation, samples
        config = read_stock_config(folder)
        refuse_quantised(config, str(folder))
        if config.num_labels < 2 or getattr(config, "problem_type", None) not in (None, "single_label_classification"):
            raise ModelError(
                f"{folder} is no classifier with one label of several",
                expected="a model that chooses one of two or more labels",
                fix="train it in a loop of your own with llmprune.sparsify",
            )
        self._classes = {str(name): int(number) for number, name in (config.id2label or {}).items()}
        with init_empty_weights(include_buffers=False), quiet_transformers():
            self.model = build_classifier(config)
        self._tokenizer = load_tokenizer(folder)
        self._require_padding(config.get_text_config().vocab_size)
        most = getattr(config, "max_position_embeddings", None) or _LENGTH
        self._length = min(length or _LENGTH, most)
        self._teacher: Any = None

    def read(self, watch: Watcher) -> None:
        """Read the labelled texts, shuffled, with held-back ones at the end, and those for the evaluation.

        Files are often sorted by label: of one that is, the first texts would be of one class, and the last of another.

        Raises:
            CalibrationError: all texts to train on have the same label.
        """
        watch(Progress("training text", step=self._source))
        examples = read_examples(self._source, self._classes)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.options.seed)).tolist()
        chosen = [examples[place] for place in order[: self._samples]]
        self._require_classes(chosen[: len(chosen) - self.options.kept_back(len(chosen))])
        self.rows = self._rows(chosen, self._source)
        digest = hashlib.sha256()
        for row in self.rows:
            for key, value in sorted(row.items()):
                digest.update(key.encode() + value.numpy().tobytes())
        self.digest = digest.hexdigest()
        if self._evaluation is not None:
            self._measured = self._rows(read_examples(self._evaluation, self._classes), self._evaluation)
        self.text = {
            "source": self._source, "samples": self._samples, "length": self._length, "examples": len(self.rows),
            "classes": self._classes,
        }  # fmt: skip

    def load(self, device: torch.device, *, teacher: bool) -> None:
        """Read the weights."""
        self.model = self._loaded(self.folder).to(device)
        if teacher:
            self._teacher = self._loaded(self.folder).to(device).eval()

    @contextmanager
    def session(self) -> Iterator[None]:
        """In which the model returns its logits, and those of the checkpoint's model if that teaches."""
        model, teacher = self.model, self._teacher

        def forward(**inputs: Any) -> dict[str, Tensor]:
            found = {"logits": type(model).forward(model, **inputs).logits}
            if teacher is not None:
                with torch.no_grad():
                    found["dense"] = teacher(**inputs).logits
            return found

        model.forward = forward
        try:
            yield
        finally:
            del model.forward
            vars(model).pop("_original_forward", None)  # accelerate's

    def loss(self, outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
        """The cross-entropy of the labels, the KL divergence from the checkpoint's model, or a mix."""
        weight = self.options.kl_weight
        logits = outputs["logits"].float()
        loss = cross_entropy(logits, labels, reduction="sum")
        if self._teacher is None or not weight:
            return loss, len(labels)
        divergence = kl_div(
            logits.log_softmax(-1), outputs["dense"].float().log_softmax(-1), reduction="sum", log_target=True
        )
        return weight * divergence + (1 - weight) * loss, len(labels)

    def early_loss(self, rows: Sequence[Row], temperature: float) -> Tensor:
        """The cross-entropy of the labels."""
        batch = {key: torch.stack([row[key] for row in rows]).to(self.device) for key in rows[0]}
        labels = batch.pop("labels")
        return cross_entropy(self.model(**batch).logits.float() / temperature, labels)

    def score(self, outputs: Any, labels: Tensor) -> tuple[float, int]:
        """How many labels are right."""
        return float((outputs["logits"].argmax(-1) == labels).sum()), len(labels)

    def quality(self, mean: float) -> float:
        """Accuracy, in [0, 1]."""
        return mean

    def write(self, target: Path, watch: Watcher) -> None:
        """Write it with its tokenizer, as save_pretrained does."""
        watch(Progress("writing"))
        dtypes, main = _dtypes(self.folder)
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        stored = {
            name: positive_zeros(tensor.to(dtypes.get(name, main))) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        result = copy.deepcopy(self.model).cpu().to(main)
        with writing_to(target), quiet_transformers():
            result.save_pretrained(target, state_dict=stored)
            for left_out in copy_companions(self.folder, target):
                watch(Progress(left_out))

    def stored_dtypes(self) -> Mapping[str, torch.dtype]:
        """Those of the checkpoint; of parameters that it lacks, its most common one."""
        dtypes, main = _dtypes(self.folder)
        return {name: dtypes.get(name, main) for name, _ in self.model.named_parameters()}

    @property
    def evaluates(self) -> bool:
        """Whether there is a file to evaluate on."""
        return self._evaluation is not None

    def evaluate(self, result: Path, watch: Watcher) -> dict[str, Any]:
        """The accuracy of both on the file."""
        rows, found = self._measured, {}
        for name, folder in (("before", self.folder), ("after", result)):
            watch(Progress(f"accuracy {name}"))
            found[name] = self._accuracy(folder, rows)
        return {**found, "evaluated_on": self._evaluation, "examples": len(rows)}

    @torch.no_grad()
    def _accuracy(self, folder: Path, rows: Sequence[Row]) -> float:
        model, right, size = self._loaded(folder).to(self.device).eval(), 0.0, self.options.batch_size
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = {key: torch.stack([row[key] for row in part]).to(self.device) for key in part[0]}
            labels = batch.pop("labels")
            right += self.score({"logits": model(**batch).logits}, labels)[0]
        return right / len(rows)

    def _require_padding(self, vocabulary: int) -> None:
        number = self._tokenizer.pad_token_id
        if number is None or number >= vocabulary:
            found = "no padding token" if number is None else f"padding token {number}, of {vocabulary} in the model"
            raise TrainingError(
                f"the tokenizer of {self.folder} has {found}",
                expected="a padding token that the model knows: texts of a batch differ in length",
                fix="set pad_token in tokenizer_config.json, for example to the EOS token",
            )

    def _require_classes(self, trained: Sequence[Example]) -> None:
        """Refuse to learn one class of several; of classes that are missing, say so."""
        found = {example.label for example in trained}
        missing = [name for name, number in self._classes.items() if number not in found]
        if len(found) < 2:
            raise CalibrationError(
                f"all {len(trained)} texts to train on of {self._source} have the same label",
                expected="texts of every class",
                fix="use more of the file (--num-samples), or another one",
            )
        if missing:
            warnings.warn(
                f"no text to train on of {self._source} has the label {' or '.join(missing)}, which the model unlearns",
                stacklevel=2,
            )

    def _rows(self, examples: Sequence[Example], source: str) -> list[Row]:
        texts = [example.text for example in examples]
        pairs = [example.pair for example in examples]
        with explained(
            f"the tokenizer of {self.folder} cannot encode {source}",
            expected="a tokenizer that pads and truncates texts",
            fix="correct tokenizer_config.json",
            raised=TrainingError,
        ):
            encoded = self._tokenizer(
                texts, pairs if any(pairs) else None, padding="longest", truncation=True, max_length=self._length,
                return_tensors="pt",
            )  # fmt: skip
        labels = torch.tensor([example.label for example in examples])
        return [
            {**{key: value[number] for key, value in encoded.items()}, "labels": labels[number]}
            for number in range(len(examples))
        ]

    def _loaded(self, folder: Path) -> Any:
        with quiet_transformers():
            model = load_classifier(folder)
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "pad_token_id", None) is None:  # by which decoders find the last token of a text
                config.pad_token_id = self._tokenizer.pad_token_id
        return model
