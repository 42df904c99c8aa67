"""What a run did: one row per matrix, and a header with everything needed to repeat it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict
from typing_extensions import NotRequired

from llmprune.errors import CheckpointError, MissingPackageError
from llmprune.losses import StepLoss
from llmprune.storage.files import read_json, write_json
from llmprune.storage.records import CLOSED, read_as
from llmprune.storage.report_header import Header
from llmprune.units import format_change, quantity

REPORT_NAME = "report.json"
PAGE_NAME = "report.html"


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """One pruned matrix.

    Attributes:
        layer: dotted name of its decoder layer.
        name: dotted name of the matrix.
        shape: (out, in).
        pattern: as requested.
        method: as requested.
        zeros: counted in the stored matrix.
        error: relative output error ||(W - V) X||^2 / ||W X||^2 on held-out rows X, with W the dense and V the stored
            matrix; None if it could not be measured.
        damping: the damping used; None for methods without one.
        damping_tried: every damping tried, in order; more than one means that the factorisation failed at first.
        tokens: input rows in the statistics; 0 without any.
        prior_tokens: imaginary uncorrelated rows added for an expert that received too few tokens.
        dead_inputs: inputs that were always zero; None without statistics.
        seconds: spent on solving this matrix; 0 if nothing was solved, as in a training.
        peak_bytes: peak memory of the process (CPU) or of the device (CUDA) so far; 0 if unknown.
        top_tokens: the share of the squared inputs that the largest 1 % of the tokens have, before they were weighed;
            None without statistics, and in reports from before it was recorded.
        losses: of a chain, after each of its parts; empty for other methods.
        correction: ||W' - W|| / ||W||, with W' what corrects earlier errors (`statistics.alpha`) and was solved for in
            place of the dense W; above 0.3, W was. None if errors were not collected.
        by_magnitude: whether magnitudes decided, because all gradients were zero, as in experts without tokens.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    layer: str
    name: str
    shape: tuple[int, int]
    pattern: str
    method: str
    zeros: int
    error: float | None
    damping: float | None
    damping_tried: tuple[float, ...]
    tokens: int
    prior_tokens: int
    dead_inputs: int | None
    seconds: float
    peak_bytes: int
    top_tokens: float | None = None
    losses: tuple[StepLoss, ...] = ()
    correction: float | None = None
    by_magnitude: bool = False

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, counted."""
        return self.zeros / (self.shape[0] * self.shape[1])


@dataclass(frozen=True, slots=True)
class StructureRow:
    """What was removed from one structure.

    Attributes:
        layer: dotted name of its decoder layer in the smaller model.
        kind: heads, ffn or experts.
        consumer: dotted name of the matrix that reads the groups (for experts: that gives their output).
        groups: how many there were.
        kept: how many are kept.
        method: how they were chosen.
        refit: whether the kept weights were refitted.
        compensated: whether the mean of the removed outputs was added to the consumer's bias (FLAP).
        error: relative output error of the consumer on held-out rows, a mean over experts; None: not measured.
        damping: the largest damping used; None without a refit.
        swaps: exchanges made after the greedy search.
        tokens: input rows in the statistics.
        removed: the removed groups; None if they differ from expert to expert.
        seconds: spent on choosing and refitting.
        peak_bytes: peak memory of the process (CPU) or of the device (CUDA) so far; 0 if unknown.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    layer: str
    kind: str
    consumer: str
    groups: int
    kept: int
    method: str
    refit: bool
    compensated: bool
    error: float | None
    damping: float | None
    swaps: int
    tokens: int
    removed: tuple[int, ...] | None
    seconds: float
    peak_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return dataclasses.asdict(self)


# Targets of layers that stand for removed ones.
STANDING = ("linear", "merge")


@dataclass(frozen=True, slots=True)
class MatchRow:
    """One layer that was fitted as a whole after its matrices were solved, or to stand for removed ones before.

    Attributes:
        layer: dotted name of the decoder layer.
        target: what it was fitted to, as in the recipe: dense, local or corrected. "linear": a map of its MLP's output,
            fitted to the outputs of the removed layers after it; "merge": those layers were merged into it.
        before: mean over the tokens of the validation sequences of ||f(h) - T||^2 / ||T||^2, before; of a layer whose
            attention was fitted first, before that.
        after: the same afterwards; never higher.
        epochs: epochs that were run.
        best: the epoch that was kept; 0: the layer stays as it was.
        seconds: spent on it.
        part: layer: its output; attention: what it returns without its MLP, fitted first (`reconstruct.window`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    layer: str
    target: str
    before: float
    after: float
    epochs: int
    best: int
    seconds: float
    part: str = "layer"


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of all structures of a kind.

    Attributes:
        kind: in words, such as "FFN channels".
        amount: how many of how many.
        where: in which layers, if they are counted per layer; otherwise empty.
    """

    kind: str
    amount: str
    where: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.amount, self.kind, self.where)))

    @classmethod
    def of(cls, kind: str, rows: Sequence[StructureRow], layers: int) -> "Left":
        """Add up the rows of all structures of one kind, in a model with this many layers."""
        places = len({row.layer for row in rows})
        among = f"{places} layers" if places == layers else f"{places} of {layers} layers"
        if len({(row.groups, row.kept) for row in rows}) == 1:
            return cls(kind, f"{rows[0].kept:,} of {rows[0].groups:,}", f"in each of {among}")
        groups, kept = sum(row.groups for row in rows), sum(row.kept for row in rows)
        widths = len({row.kept for row in rows})
        return cls(kind, f"{kept:,} of {groups:,}", f"in {among}, {widths} different widths")


# Above this share of the squared inputs, a few tokens decide what the statistics look like.
_MASSIVE = 0.5

_KINDS = {"heads": "groups of attention heads", "ffn": "FFN channels", "experts": "experts"}


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """The result of a run.

    Attributes:
        rows: one per pruned matrix, in the order of the layers.
        header: model, recipe, versions, hashes, device, seconds by stage, memory, perplexities; JSON-ready.
        structures: one per structure that lost groups, in the order of the layers.
        matches: one per layer that was fitted as a whole.
    """

    rows: tuple[MatrixRow, ...]
    header: dict[str, Any] = field(default_factory=dict)
    structures: tuple[StructureRow, ...] = ()
    matches: tuple[MatchRow, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned matrices, counted."""
        elements = sum(row.shape[0] * row.shape[1] for row in self.rows)
        return sum(row.zeros for row in self.rows) / max(elements, 1)

    @property
    def overall_sparsity(self) -> float | None:
        """Fraction of zeros among all weights of the pruned model, embeddings and LM head included; None if unknown."""
        parameters = self.header.get("parameters")
        return sum(row.zeros for row in self.rows) / parameters if parameters else None

    @property
    def mean_error(self) -> float | None:
        """Mean relative output error of the matrices for which it was measured."""
        measured = [row.error for row in self.structures] + [row.error for row in self.rows]
        errors = [error for error in measured if error is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def massive(self) -> MatrixRow | None:
        """The matrix whose largest 1 % of tokens have the most of its squared inputs, if that is more than half."""
        rows = [row for row in self.rows if row.top_tokens is not None and row.top_tokens > _MASSIVE]
        return max(rows, key=lambda row: row.top_tokens or 0.0, default=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the run could not do as usual, a sentence each."""
        return tuple(map(str, self.header.get("notes") or ()))

    @property
    def left(self) -> list[Left]:
        """What is left of each kind of structure that lost some; empty if only weights were pruned."""
        extent = self.header.get("extent")
        if not extent:
            return []
        dense, pruned = extent["dense"], extent["pruned"]
        found = [Left("decoder layers", f"{pruned['layers']} of {dense['layers']}")]
        found += [Left("hidden channels", f"{pruned['hidden_size']:,} of {dense['hidden_size']:,}")]
        found = [one for one, key in zip(found, ("layers", "hidden_size"), strict=True) if pruned[key] < dense[key]]
        evidence = (self.header.get("decisions") or {}).get("evidence", {})
        for part, name in (("attention", "attention blocks"), ("mlp", "MLP blocks")):
            if gone := len(evidence.get(part, {}).get("removed", ())):
                found.append(Left(name, f"{pruned['layers'] - gone} of {pruned['layers']}"))
        heads = ((self.header.get("recipe") or {}).get("structures") or {}).get("heads") or {}
        names = _KINDS | ({"heads": "query heads"} if heads.get("unit") == "query-head" else {})
        kinds: dict[str, list[StructureRow]] = {}
        for row in self.structures:
            kinds.setdefault(names[row.kind], []).append(row)
        return found + [Left.of(kind, rows, pruned["layers"]) for kind, rows in kinds.items()]

    @property
    def dense_perplexity(self) -> float | None:
        """Perplexity of the dense model, which may be infinite; None if the recipe measures none."""
        return self._evaluation("dense")

    @property
    def pruned_perplexity(self) -> float | None:
        """Perplexity of the pruned model, which may be infinite; None if the recipe measures none."""
        return self._evaluation("pruned")

    @property
    def change(self) -> tuple[str, str]:
        """What was measured, and how it changed, in words; empty if nothing was measured.

        Of a recovery that is from the pruned model to the recovered one; otherwise from the dense one to the pruned.
        """
        recovery, training = (self.header.get(key) or {} for key in ("recovery", "training"))
        if found := recovery.get("perplexity"):
            values = {name: math.inf if value is None else value for name, value in found.items()}
            dense = f", dense {values['dense']:,.2f}" if "dense" in values else ""
            return "perplexity", format_change(values["pruned"], values["recovered"]) + dense
        if training.get("measure") == "accuracy" and "before" in training:
            return "accuracy", f"{training['before']:.1%} -> {training['after']:.1%}"
        if self.dense_perplexity is not None and self.pruned_perplexity is not None:
            return "perplexity", format_change(self.dense_perplexity, self.pruned_perplexity)
        return "", ""

    def __repr__(self) -> str:
        figures = [str(self.header.get("model") or "")]
        figures += [done for key, done in (("recovery", "recovered"), ("training", "trained")) if self.header.get(key)]
        figures += (
            [quantity(len(self.rows), "matrix", "matrices"), f"sparsity {self.sparsity:.1%}"] if self.rows else []
        )
        figures += [*map(str, self.left), " ".join(filter(None, self.change))]
        return f"Report({', '.join(filter(None, figures))})"

    def to_dataframe(self) -> Any:
        """The matrices as a pandas data frame: one row each, with the fields of `MatrixRow` and the sparsity.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            frames = import_module("pandas")
        except ImportError as error:
            raise MissingPackageError.of("pandas", "a data frame") from error
        columns = [item.name for item in dataclasses.fields(MatrixRow)]
        rows = [dataclasses.asdict(row) | {"sparsity": row.sparsity} for row in self.rows]
        return frames.DataFrame(rows, columns=[*columns, "sparsity"])

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        summary = {"sparsity": self.sparsity, "mean_error": self.mean_error, "matrices": len(self.rows)}
        structures = [row.to_dict() for row in self.structures]
        rows = [dataclasses.asdict(row) for row in self.rows]
        matches = [dataclasses.asdict(row) for row in self.matches]
        return {**self.header, "summary": summary, "structures": structures, "matches": matches, "rows": rows}

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = [("model", str(self.header.get("model", "")))]
        rows += [self.change] if self.change[0] else []
        rows += [(left.kind, f"{left.amount} {left.where}".strip()) for left in self.left]
        if self.rows:
            overall = "" if self.overall_sparsity is None else f", {self.overall_sparsity:.2%} of all weights"
            rows.append(("sparsity", f"{self.sparsity:.2%} of the weights in the pruned matrices{overall}"))
        if self.mean_error is not None:
            rows.append(("mean relative output error", f"{self.mean_error:.4f}"))
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
        return f"<table>{cells}</table>"

    def save(self, folder: Path) -> Path:
        """Write report.json into a folder, atomically; returns its path."""
        write_json(folder / REPORT_NAME, self.to_dict())
        return folder / REPORT_NAME

    def _evaluation(self, which: str) -> float | None:
        evaluation = self.header.get("evaluation")
        if not evaluation:
            return None
        perplexity = evaluation[which]["perplexity"]
        # JSON has no infinity.
        return math.inf if perplexity is None else perplexity


class _Content(Header):
    rows: tuple[MatrixRow, ...]
    structures: tuple[StructureRow, ...]
    matches: NotRequired[tuple[MatchRow, ...]]
    summary: dict[str, Any]


def load_report(folder: Path) -> Report:
    """Read a run's report.json back.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not (folder / REPORT_NAME).exists():
        runs, fix = any(folder.glob(f"*/{REPORT_NAME}")), "check the path; finish an interrupted run with --resume"
        raise CheckpointError(
            f"{folder} has no {REPORT_NAME}" if folder.exists() else f"there is no folder {folder}",
            expected="the output folder of a finished run",
            fix=f"name the runs in it: {folder}/*" if runs else fix,
        )
    content = read_as(
        folder / REPORT_NAME,
        _Content,
        expected="the report of a finished run",
        fix="delete it and run again with --resume, which rewrites it",
    )
    # As it is in the file, in its order: a report that is read and shown again is the same text.
    written = read_json(folder / REPORT_NAME)
    header = {key: value for key, value in written.items() if key not in ("rows", "structures", "matches", "summary")}
    return Report(content["rows"], header, content["structures"], content.get("matches", ()))
