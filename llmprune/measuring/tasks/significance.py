"""Two models' scores side by side, and whether their difference is significant.

Both models answer the same questions, so their errors are correlated, and the standard error of the difference is that
of paired samples: the jackknife over documents (Efron and Stein, 1981), which for a mean is the standard error of the
mean difference, and for a word perplexity needs no assumption about its exponential. If a score is not a function of a
ratio of sums over documents (F1, a group's mean), the two standard errors of lm-eval are combined as if they were
independent, which overstates the error for models that mostly agree.

A difference is significant if |delta| > 2 standard errors; with only a few documents that says little. For paired
perplexities the test is on log-perplexity: the error of the difference itself is mostly that of the level, which both
models share.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The number of standard errors that a significant difference exceeds.
STANDARD_ERRORS = 2.0

Results = Mapping[str, Any]
Link = Callable[[Any], Any]

# How lm-eval turns r = sum(values) / sum(weights) over documents into a score: a mean or lambada's perplexity, with
# equal weights; word and byte perplexity and bits per byte, where a document's weight is its length.
_UNWEIGHTED: tuple[Link, ...] = (lambda r: r, lambda r: np.exp(-r))
_WEIGHTED: tuple[Link, ...] = (lambda r: np.exp(-r), lambda r: -r / math.log(2))


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One score of a task.

    Attributes:
        task: or group of tasks.
        metric: as lm-eval calls it.
        filter: lm-eval's filter of the answers; "none" for no filter.
        documents: number scored.
        higher_is_better: None if lm-eval does not say.
        value: the model's score; None if it is not finite.
        stderr: its standard error, by lm-eval; None if there is none.
        dense_value: the dense model's score; None without one.
        dense_stderr: its standard error.
        delta: value - dense_value.
        delta_stderr: the standard error of delta; None if unknown.
        test: how delta_stderr was computed: from paired documents, or from two errors as if independent.
        significant: whether |delta| > 2 delta_stderr (for paired perplexities: of log-perplexity); None if unknown.
    """

    task: str
    metric: str
    filter: str
    documents: int
    higher_is_better: bool | None
    value: float | None
    stderr: float | None
    dense_value: float | None = None
    dense_stderr: float | None = None
    delta: float | None = None
    delta_stderr: float | None = None
    test: Literal["paired", "unpaired"] | None = None
    significant: bool | None = None

    @property
    def verdict(self) -> str:
        """In a word: better, worse, differs, within error, or empty if unknown."""
        if self.significant is None or self.delta is None:
            return ""
        if not self.significant:
            return "within error"
        if self.higher_is_better is None:
            return "differs"
        return "better" if (self.delta > 0) == self.higher_is_better else "worse"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def compare_results(pruned: Results, dense: Results | None = None) -> tuple[ScoreRow, ...]:
    """Compare two results of lm-eval, score by score.

    Args:
        pruned: as lm-eval returns them, with samples.
        dense: the same tasks by another model.
    """
    rows = []
    for task, scores in pruned["results"].items():
        for key, value in scores.items():
            metric, comma, filtered = key.rpartition(",")
            if comma and not metric.endswith("_stderr") and _is_number(value):
                rows.append(_row(task, metric, filtered, pruned, dense))
    return tuple(rows)


class PairedTest(NamedTuple):
    """The standard error of a difference, and whether the difference is significant."""

    error: float
    significant: bool


def paired_test(scores: tuple[float, float], values: tuple[Sequence[Any], Sequence[Any]]) -> PairedTest | None:
    """Compare two scores on the same documents by the jackknife.

    Args:
        scores: of both models.
        values: of both, one per document in the same order: a number, or a log-likelihood with its length.

    Returns:
        None if there are fewer than two documents, or no known function of their values gives both scores.
    """
    sides = [_columns(side) for side in values]
    if len(values[0]) < 2 or not sides[0] or not sides[1]:
        return None
    with np.errstate(all="ignore"):  # a division by zero or an overflow reproduces no score, or yields no finite error
        ratios = [x.sum() / w.sum() for x, w in (sides[0], sides[1])]
        without = [(x.sum() - x) / (w.sum() - w) for x, w in (sides[0], sides[1])]
        for link in _WEIGHTED if isinstance(values[0][0], tuple | list) else _UNWEIGHTED:
            # The right function is the one that reproduces the scores that lm-eval has reported.
            if all(_is_close(link(ratio), score) for ratio, score in zip(ratios, scores, strict=True)):
                error = _jackknife(link(without[0]) - link(without[1]))
                larger = abs(ratios[0] - ratios[1]) > STANDARD_ERRORS * _jackknife(without[0] - without[1])
                return PairedTest(error, bool(larger)) if math.isfinite(error) else None
    return None


def _jackknife(without: NDArray[np.float64]) -> float:
    """The standard error of an estimate, from its values with one document left out at a time."""
    return math.sqrt((len(without) - 1) * float(without.var()))


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def _row(task: str, metric: str, filtered: str, pruned: Results, dense: Results | None) -> ScoreRow:
    value, stderr = _score(pruned, task, metric, filtered)
    direction = pruned.get("higher_is_better", {}).get(task, {}).get(metric)
    first = (task, metric, filtered, _documents(pruned, task), direction, value, stderr)
    if dense is None:
        return ScoreRow(*first)
    other, other_error = _score(dense, task, metric, filtered)
    if value is None or other is None:
        return ScoreRow(*first, other, other_error)
    delta = value - other
    ours, theirs = (_samples(results, task, metric, filtered) for results in (pruned, dense))
    if ours.keys() == theirs.keys():
        paired = paired_test((value, other), ([*ours.values()], [theirs[key] for key in ours]))
        if paired is not None:
            return ScoreRow(*first, other, other_error, delta, paired.error, "paired", paired.significant)
    if stderr is None or other_error is None:
        return ScoreRow(*first, other, other_error, delta)
    error = math.hypot(stderr, other_error)
    return ScoreRow(*first, other, other_error, delta, error, "unpaired", abs(delta) > STANDARD_ERRORS * error)


def _samples(results: Results, task: str, metric: str, filtered: str) -> dict[tuple[int, str], Any]:
    """The value of each document; empty if some have none, and for groups."""
    samples = [sample for sample in results.get("samples", {}).get(task, ()) if sample["filter"] == filtered]
    if not all(metric in sample for sample in samples):
        return {}
    return {(sample["doc_id"], sample["doc_hash"]): sample[metric] for sample in samples}


def _columns(values: Sequence[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Values and weights as float64 [documents]; None if they are something else."""
    pairs = [value if isinstance(value, tuple | list) else (value, 1) for value in values]
    if not all(len(pair) == 2 and all(_is_number(part) for part in pair) for pair in pairs):
        return None
    columns = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def _score(results: Results, task: str, metric: str, filtered: str) -> tuple[float | None, float | None]:
    scores = results["results"].get(task, {})
    return _finite(scores.get(f"{metric},{filtered}")), _finite(scores.get(f"{metric}_stderr,{filtered}"))


def _documents(results: Results, task: str) -> int:
    counts = results.get("n-samples", {})
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_documents(results, child) for child in results.get("group_subtasks", {}).get(task, ()))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | np.bool_)


def _finite(value: Any) -> float | None:
    """The value if it is a finite number; lm-eval writes "N/A" where it has no error."""
    return float(value) if _is_number(value) and math.isfinite(value) else None
