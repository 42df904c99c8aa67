"""How many weights are zero at each stage of a training."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from llmprune.errors import TrainingError

Kind = Literal["cubic", "linear", "one-shot", "iterative"]

# A typing mistake of a few zeros must not fill the memory with stages.
_MOST_STAGES = 10_000


@dataclass(frozen=True, slots=True)
class Schedule:
    """The stages of a training, each of which prunes and then trains.

    Attributes:
        kind: how the sparsity rises. "cubic": fast at first, and ever more slowly (Zhu and Gupta 2017, To prune, or not
            to prune, arXiv 1710.01878, equation 1); "linear": by the same each time; "iterative": each stage removes
            the same fraction of the weights that are left (Han et al. 2015, arXiv 1506.02626); "one-shot": all at the
            first stage, and the others only train.
        stages: how many, from 1 to 10,000; each is scored, and its state saved.
        start: sparsity before the first stage, in [0, 1).
        end: sparsity of the last stage, in (start, 1).
        every: optimizer steps of training in each stage, at least 1; None: `llmprune train` passes over its text.
        dense: optimizer steps before the first stage, at least 0, at the sparsity `start`; None: as many as a stage
            has where the rule learns from them or goes back to them, and otherwise none.

    Raises:
        TrainingError: a value is out of range.

    Example:
        >>> [round(sparsity, 3) for sparsity in Schedule("cubic", stages=4, end=0.8).sparsities]
        [0.463, 0.7, 0.788, 0.8]
    """

    kind: Kind = "cubic"
    stages: int = 10
    start: float = 0.0
    end: float = 0.5
    every: int | None = None
    dense: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("kind", self.kind in get_args(Kind), ", ".join(get_args(Kind))),
            ("stages", 1 <= self.stages <= _MOST_STAGES, f"at least 1, and at most {_MOST_STAGES:,}"),
            ("start", 0 <= self.start < 1, "a fraction of zeros, at least 0 and below 1"),
            ("end", self.start < self.end < 1, f"a fraction of zeros above start, which is {self.start}, and below 1"),
            ("every", self.every is None or self.every >= 1, "at least one optimizer step"),
            ("dense", self.dense is None or self.dense >= 0, "at least 0 optimizer steps"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise TrainingError(f"schedule.{name} is {getattr(self, name)!r}", expected=expected)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsity of each stage."""
        return tuple(self._sparsity(number / self.stages) for number in range(1, self.stages + 1))

    def _sparsity(self, passed: float) -> float:
        """The sparsity when a part of the stages, in (0, 1], has begun."""
        if passed == 1 or self.kind == "one-shot":
            return self.end
        if self.kind == "cubic":
            return self.end + (self.start - self.end) * (1 - passed) ** 3
        if self.kind == "linear":
            return self.start + (self.end - self.start) * passed
        kept = (1 - self.start) * math.exp(passed * math.log((1 - self.end) / (1 - self.start)))
        return 1 - kept
