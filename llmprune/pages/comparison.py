"""Compare any number of runs in figures that mean the same for all of them.

Perplexities and KL divergences are comparable only if measured on the same tokens, so runs are grouped by these.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError, MissingPackageError
from llmprune.pages import labels
from llmprune.pages.beside import read_beside
from llmprune.pages.page import Table
from llmprune.pages.references import measured_references, references, unrecovered
from llmprune.pages.run_row import COLUMNS, RunRow, cells, run_row
from llmprune.paths import user_path
from llmprune.storage.report import load_report


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of runs.

    Attributes:
        rows: ordered by group, with the references first in each, the dense one before the others.
        texts: sha256 of evaluation tokens -> description of the text.
        notes: what cannot be compared, and why.
    """

    rows: tuple[RunRow, ...]
    texts: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[RunRow, ...]:
        """The rows without the references."""
        return tuple(row for row in self.rows if not row.is_reference)

    @property
    def groups(self) -> dict[str | None, tuple[RunRow, ...]]:
        """Rows by the text that they were evaluated on; None for those without an evaluation."""
        found: dict[str | None, list[RunRow]] = {}
        for row in self.rows:
            found.setdefault(row.text, []).append(row)
        return {text: tuple(rows) for text, rows in found.items()}

    def title(self, text: str | None) -> str:
        """Description of the text that a group was evaluated on."""
        return "without an evaluation" if text is None else f"{self.texts[text]} (sha256 {text[:12]})"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        rows = [row.to_dict() for row in self.rows]
        return {"rows": rows, "texts": dict(self.texts), "notes": list(self.notes)}

    def to_frame(self) -> Any:
        """As a pandas data frame, with a column for each lm-eval task.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            frames = import_module("pandas")
        except ImportError as error:
            raise MissingPackageError.of("pandas", "a data frame") from error
        rows = [dataclasses.asdict(row) for row in self.rows]
        return frames.DataFrame([{**row, **row.pop("scores")} for row in rows])

    def _repr_html_(self) -> str:
        tables = [self.table(text).html() for text in self.groups]
        return "\n".join(tables)

    def table(self, text: str | None) -> Table:
        """One group as a table, without columns that would be empty."""
        found = [cells(row) for row in self.groups[text]]
        places = [place for place in range(len(COLUMNS)) if any(row[place] for row in found)]
        rows = tuple(tuple(row[place] for place in places) for row in found)
        return Table(tuple(COLUMNS[place] for place in places), rows, text=(0, 1), caption=self.title(text))


def compare(folders: Iterable[str | Path], against: str | Path | None = None) -> Comparison:
    """Compare runs.

    Args:
        folders: output folders of finished runs, packed ones too. Plain files among them are ignored.
        against: the dense base, as a hub id, a folder or "testbed": adds a row with its size, its scores, and its
            perplexity if one of the runs has measured that. None: a row of what the runs have measured of theirs.

    Raises:
        CheckpointError: there are no folders, a report is missing, or a checkpoint is damaged.
        ModelError: the dense model cannot be found.

    Example:
        >>> compare(["out/a", "out/b"], against="testbed").to_frame()  # doctest: +SKIP
    """
    # A shell's DIR/* also matches files, such as the record of a sweep.
    paths = [path for path in (user_path(folder, CheckpointError) for folder in folders) if not path.is_file()]
    if not paths:
        raise CheckpointError("no folders to compare", expected="the output folder of at least one run")
    runs = [(path, load_report(path), read_beside(path)) for path in paths]
    names = _names(paths)
    rows = [run_row(name, *run) for name, run in zip(names, runs, strict=True)]
    notes = [f"{name}: {note}" for name, (_, _, beside) in zip(names, runs, strict=True) for note in beside.notes]
    before = unrecovered(runs, rows)
    if against is not None:
        dense, said = references(against, runs, rows)
        rows = [*dense, *before, *rows]
        notes += said
    else:
        rows = [*measured_references(report for _, report, _ in runs), *before, *rows]
    rows, said = _with_mean_scores(rows)
    texts = {
        measured["tokens_digest"]: labels.text_line(measured)
        for _, report, _ in runs
        if (measured := labels.measured_text(report.header))
    }
    order = list(dict.fromkeys(row.text for row in rows))
    rows.sort(key=lambda row: order.index(row.text))
    return Comparison(tuple(rows), texts, (*_text_notes(order), *said, *_speed_notes(rows), *notes))


def _with_mean_scores(rows: Sequence[RunRow]) -> tuple[list[RunRow], list[str]]:
    """Add the mean over the tasks that all evaluated rows share, so that it is comparable."""
    evaluated = [row for row in rows if row.scores]
    if not evaluated:
        return list(rows), []
    every = list(dict.fromkeys(task for row in evaluated for task in row.scores))
    shared = [task for task in every if all(task in row.scores for row in evaluated)]
    notes = [f"tasks: mean of {', '.join(shared)}"] if shared else ["the runs have no lm-eval task in common"]
    if others := [task for task in every if task not in shared]:
        notes.append(f"not in the mean, because some runs lack them: {', '.join(others)}")
    if not shared:
        return list(rows), notes
    return [
        dataclasses.replace(row, score=sum(row.scores[task] for task in shared) / len(shared)) if row.scores else row
        for row in rows
    ], notes


def _text_notes(texts: Sequence[str | None]) -> list[str]:
    if len([text for text in texts if text is not None]) < 2:
        return []
    return ["perplexities of different groups were measured on different tokens and are not comparable"]


def _speed_notes(rows: Iterable[RunRow]) -> list[str]:
    ways = list(dict.fromkeys(row.speed_of for row in rows if row.speed_of))
    if not ways:
        return []
    warning = ["speed-ups were measured in different ways and are hardly comparable"] if len(ways) > 1 else []
    return [*warning, *(f"speed-up of {way}" for way in ways)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return ["/".join(part[-length:]) for part in parts]
