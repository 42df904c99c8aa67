"""How a pruned model is trained: the options of `recover`, checked."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from llmprune.errors import RecoveryError
from llmprune.recipe.bundled import open_recipe
from llmprune.recipe.document import RecipeDumper
from llmprune.recovery.optimizers import require_offered
from llmprune.storage.records import wrong_type

Loss = Literal["kl", "cross-entropy", "mix"]
Adapter = Literal["none", "lora", "shira", "low-rank"]


@dataclass(frozen=True, slots=True)
class RecoveryOptions:
    """How a pruned model is trained.

    Attributes:
        loss: "kl": the KL divergence from the dense model's predictions; "cross-entropy": that of the text; "mix" of
            both.
        kl_share: share of the KL divergence in "mix", between 0 and 1.
        learning_rate: its peak, above 0; after the warm-up it falls to 0 along a cosine.
        warmup: share of the steps during which it rises, in [0, 1).
        epochs: passes over the text, above 0; may be a fraction.
        batch_size: sequences per forward pass and device, at least 1.
        accumulation: forward passes per step, at least 1.
        weight_decay: of AdamW, at least 0.
        clip: largest norm of the gradient of kept weights; 0: it is not clipped.
        optimizer: a name of transformers' `optim` whose optimizer keeps zeros; not LOMO, APOLLO or schedule-free.
        adapter: "lora": train masked adapters of low rank, which are merged in the end, in place of all weights;
            "shira": train some of the kept weights; "low-rank": train ordinary adapters, which are saved beside the
            sparse weights, for PEFT.
        rank: of the adapters, at least 1; "shira" trains as many weights as adapters of this rank would have.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        held_back: sequences at the end of the text that are not trained on, but scored; 0: none. None: one in 16.
        evaluations: how often they are scored and the state is saved, at least 1.
        patience: stop after so many of these without an improvement, at least 1; 0: never.
        seed: of the order of the sequences, in [0, 2^32).

    Raises:
        RecoveryError: a value is out of range; the optimizer is unknown, brings pruned weights back, or does not fit.
    """

    loss: Loss = "kl"
    kl_share: float = 0.5
    learning_rate: float = 1e-4
    warmup: float = 0.05
    epochs: float = 3.0
    batch_size: int = 8
    accumulation: int = 1
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw_torch"
    adapter: Adapter = "none"
    rank: int = 16
    checkpointing: bool = False
    held_back: int | None = None
    evaluations: int = 10
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        name, expected = wrong_type(type(self), asdict(self))
        if name:
            raise RecoveryError(f"{name} {getattr(self, name)!r}", expected=expected)
        finite = "a finite number above 0"
        checks = (
            ("loss", self.loss in get_args(Loss), " or ".join(get_args(Loss))),
            ("kl_share", 0 < self.kl_share < 1, "a number between 0 and 1; kl and cross-entropy are losses themselves"),
            ("learning_rate", 0 < self.learning_rate < math.inf, finite),
            ("warmup", 0 <= self.warmup < 1, "at least 0 and below 1"),
            ("epochs", 0 < self.epochs < math.inf, finite),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("accumulation", self.accumulation >= 1, "at least 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("clip", 0 <= self.clip < math.inf, "a finite number of at least 0"),
            ("adapter", self.adapter in get_args(Adapter), " or ".join(get_args(Adapter))),
            ("rank", self.rank >= 1, "at least 1"),
            ("held_back", self.held_back is None or self.held_back >= 0, "at least 0"),
            ("evaluations", self.evaluations >= 1, "at least 1"),
            ("patience", self.patience >= 0, "at least 0"),
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise RecoveryError(f"{name} {getattr(self, name)!r}", expected=expected)
        require_offered(self.optimizer)

    @classmethod
    def read(cls, options: "RecoveryOptions | Mapping[str, Any] | str | Path | None") -> "RecoveryOptions":
        """Options from plain data, or from a YAML file such as the recipe.yaml of a recovered checkpoint.

        Raises:
            RecoveryError: a key is unknown, or a value out of range.
            RecipeError: the file cannot be read.
        """
        if isinstance(options, RecoveryOptions):
            return options
        if isinstance(options, str | Path):
            options = dict(open_recipe(options, "recover").data)
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(options or {}) - set(names)):
            raise RecoveryError(f"unknown option {unknown[0]!r}", expected=f"one of {', '.join(names)}")
        try:
            return cls(**dict(options or {}))
        except TypeError as error:
            raise RecoveryError(f"an option has a wrong type: {error}", expected="numbers and names") from error

    def to_yaml(self) -> str:
        """As YAML that `read` reads back to the same options."""
        return yaml.dump(asdict(self), Dumper=RecipeDumper, sort_keys=False)

    def with_held_back(self, count: int) -> "RecoveryOptions":
        """The same, with a number of sequences held back."""
        return replace(self, held_back=count)

    @property
    def kl_weight(self) -> float:
        """The weight of the KL divergence in the loss, in [0, 1]; the rest is that of the cross-entropy."""
        return {"kl": 1.0, "cross-entropy": 0.0, "mix": self.kl_share}[self.loss]

    def kept_back(self, sequences: int) -> int:
        """How many of some sequences are held back.

        Raises:
            RecoveryError: none would be left to train on.
        """
        count = sequences // 16 if self.held_back is None else self.held_back
        if count >= sequences:
            raise RecoveryError(
                f"held_back {count} of {sequences} sequences",
                expected="sequences to train on as well",
                fix="raise the number of samples, or lower held_back",
            )
        return count
