"""Grid search: prune one model with every recipe of a grid, and compare the results.

Each run is bit-identical to that of `llmprune.prune`, in a folder of its own; the runs share the results of the dense
model. `sweep.json` in the parent folder lists the runs and their states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmprune.errors import HeldError, LlmpruneError, ResumeError
from llmprune.pages import Comparison, compare
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.context import Run, versions
from llmprune.pruning.dense_pass import DensePass
from llmprune.pruning.forecast.forecast import dry_run
from llmprune.pruning.on_disk import prune_checkpoint
from llmprune.pruning.sweep.ledger import (
    Record,
    SweepRow,
    begin_replacing,
    plan_rows,
    read_record,
    remove_runs,
    require_sweep,
    with_outdated,
)
from llmprune.pruning.sweep.shards import Shard, join_sweep
from llmprune.recipe.grid import Combination, Grid, combine, refuse
from llmprune.recipe.recipe import Recipe
from llmprune.storage.folders import (
    MANIFEST_NAME,
    STAGING_NAME,
    expanded,
    locked,
    require_free,
    require_other,
    require_space,
)
from llmprune.storage.hub import checkpoint_digest, resolve_model


@dataclass(frozen=True, slots=True)
class Sweep:
    """The runs of a grid.

    Attributes:
        model: what was pruned.
        folder: of the sweep.
        rows: the runs of this grid in the order in which they were made, then the finished runs of earlier grids.
        comparison: of all finished runs and the dense model; None if no run has finished.
    """

    model: str
    folder: str
    rows: tuple[SweepRow, ...]
    comparison: Comparison | None

    @property
    def failed(self) -> tuple[SweepRow, ...]:
        """The runs that ended in an error."""
        return tuple(row for row in self.rows if row.state == "failed")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        comparison = None if self.comparison is None else self.comparison.to_dict()
        return {
            "model": self.model,
            "folder": self.folder,
            "rows": [asdict(row) for row in self.rows],
            "comparison": comparison,
        }


@dataclass(frozen=True, slots=True)
class ForecastRow:
    """What one run would take.

    Attributes:
        name: of its folder.
        settings: keys of the grid -> their values.
        finished: whether an earlier sweep has made it, so that it costs nothing.
        seconds: of matmuls, sampling and evaluation, see `DryRun.total_seconds`.
        peak_bytes: predicted memory, in addition to the program itself.
        disk_bytes: size of the pruned checkpoint.
    """

    name: str
    settings: dict[str, Any]
    finished: bool = False
    seconds: float = 0.0
    peak_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SweepForecast:
    """What a sweep would take.

    Attributes:
        model: as the user gave it.
        rows: the runs, in the order in which they would be made.
    """

    model: str
    rows: tuple[ForecastRow, ...]

    @property
    def seconds(self) -> float:
        """Of all runs, one after the other."""
        return sum(row.seconds for row in self.rows)

    @property
    def peak_bytes(self) -> int:
        """Of the run that needs the most."""
        return max((row.peak_bytes for row in self.rows), default=0)

    @property
    def disk_bytes(self) -> int:
        """Of all checkpoints that are still to be written."""
        return sum(row.disk_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        totals = {name: getattr(self, name) for name in ("seconds", "peak_bytes", "disk_bytes")}
        return {"model": self.model, "rows": [asdict(row) for row in self.rows], **totals}


def sweep(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    grid: Grid,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    shard: Shard | None = None,
    watch: Watcher = ignore,
) -> Sweep:
    """Grid search: prune a model with every combination of settings.

    Args:
        model: a hub id, a local checkpoint folder or "testbed".
        recipe: what all runs have in common: a bundled recipe's name, a YAML file, a mapping or a `Recipe`.
        grid: key of the recipe -> its values; a key with one value has it in all runs.
        output: folder of the sweep; each run has a folder in it, named after the settings that differ.
        resume: continue the sweep in `output`. Finished runs are kept, including those of other grids; runs that are
            new in the grid are added.
        overwrite: replace the sweep in `output`: each run in the place of one with the same name once it is whole, and
            the others once all runs are finished.
        shard: make only this part of the runs; other processes make the others in the same folder, at the same time if
            they like. Whichever comes first begins the sweep, and an interrupted one is continued.
        watch: told about every step of every run.

    Returns:
        The runs and their comparison; a failed run is a row with its error, and does not stop the others. Of a shard,
        its own runs, and the comparison of all that are finished by then.

    Raises:
        RecipeError: combinations are not valid recipes (all reported at once, before anything is written), or two are
            the same.
        ResumeError: the folder contains something else, or a sweep of another model or version.
        LlmpruneError: the model cannot be read, or `output` cannot be written.

    Example:
        >>> sweep("testbed", "demo", {"pattern": [0.5, 0.6]}, "out/demo").comparison.to_frame()  # doctest: +SKIP
    """
    folder, output = resolve_model(model), expanded(output)
    combinations = combine(recipe, grid)
    require_other(output, folder)
    keys = {"source": checkpoint_digest(folder), "version": versions()}
    if shard is not None:
        if overwrite:
            raise ResumeError("overwrite with a shard", fix="remove the old sweep, or choose another folder")
        return _sweep_shard(shard, combinations, keys, model, folder, output, watch)
    require_sweep(output, resume=resume, overwrite=overwrite)
    with locked(output):
        known = read_record(output, keys) if resume else begin_replacing(output) if overwrite else []
        earlier = [row for row in known if row.state != "replaced"]
        replaced = [row for row in known if row.state == "replaced"]
        rows = with_outdated(plan_rows(combinations, earlier), replaced)
        record = Record(output, keys, [*rows, *earlier, *replaced])
        record.write()
        runs = [(row, one.recipe) for row, one in zip(rows, combinations, strict=True)]
        _run_all(runs, record, str(model), folder, watch)
        every = [record.rows[row.name] for row in rows]
        names = {row.name for row in rows}
        if all(row.state == "finished" for row in every):
            gone = [row for row in replaced if row.name not in names]
            remove_runs(output, gone)
            record.forget([row.name for row in gone])
        every += [row for row in earlier if row.name not in names and row.state == "finished"]
        return Sweep(str(model), str(output), tuple(every), _compare(output, every, model))


def _sweep_shard(
    shard: Shard,
    combinations: Sequence[Combination],
    keys: Mapping[str, Any],
    model: str | Path,
    source: Path,
    output: Path,
    watch: Watcher,
) -> Sweep:
    """Make a part of the runs, while others may make theirs."""
    record, rows = join_sweep(output, keys, combinations)
    runs = [
        (row, one.recipe) for place, (row, one) in enumerate(zip(rows, combinations, strict=True)) if shard.has(place)
    ]
    if not runs:
        watch(Progress(f"nothing to do: shard {shard} has none of the {len(rows)} runs"))
    _run_all(runs, record, str(model), source, watch)
    record.refresh()
    own = tuple(record.rows[row.name] for row, _ in runs)
    return Sweep(str(model), str(output), own, _compare(output, [record.rows[row.name] for row in rows], model))


def forecast(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    grid: Grid,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    shard: Shard | None = None,
    watch: Watcher = ignore,
) -> SweepForecast:
    """Work out what `sweep` would do with a checkpoint, without writing anything.

    Args:
        model: a hub id, a local checkpoint folder or "testbed".
        recipe: as for `sweep`.
        grid: as for `sweep`.
        output: if given, its contents and its free disk space are checked.
        resume: as for `sweep`.
        overwrite: as for `sweep`.
        shard: as for `sweep`; the others' runs are left out.
        watch: told about every step.

    Raises:
        LlmpruneError: everything that `sweep` would refuse, and that `llmprune.dry_run` refuses for any combination,
            all at once.
    """
    folder = resolve_model(model)
    combinations = combine(recipe, grid)
    earlier: list[SweepRow] = []
    resume = resume or shard is not None
    if output is not None:
        output = expanded(output)
        require_other(output, folder)
        require_sweep(output, resume=resume, overwrite=overwrite)
        require_free(output)
        if resume:
            known = read_record(output, {"source": checkpoint_digest(folder), "version": versions()})
            earlier = [row for row in known if row.state != "replaced"]
    found: list[ForecastRow] = []
    mistakes: list[tuple[dict[str, Any], LlmpruneError]] = []
    planned = list(zip(plan_rows(combinations, earlier), combinations, strict=True))
    own = [pair for place, pair in enumerate(planned) if shard is None or shard.has(place)]
    for number, (row, combination) in enumerate(own, start=1):
        if row.state == "finished":
            found.append(ForecastRow(row.name, row.settings, finished=True))
            continue
        try:
            plan = dry_run(folder, combination.recipe, watch=_numbered(watch, number, len(own)))
        except LlmpruneError as error:
            mistakes.append((row.settings, error))
        else:
            sizes = plan.memory.peak, plan.disk_bytes
            found.append(ForecastRow(row.name, row.settings, False, plan.total_seconds, *sizes))
    refuse(mistakes, len(combinations))
    result = SweepForecast(str(model), tuple(found))
    if output is not None:
        waiting = [output / row.name for row in found if not row.finished]
        held = [sum(shard.stat().st_size for shard in path.rglob("*.safetensors")) for path in waiting]
        # An earlier result stays until the new one is whole.
        beside = max(held, default=0) if overwrite else 0
        require_space(output, result.disk_bytes - sum(held) + beside)
    return result


def _run_all(runs: Sequence[tuple[SweepRow, Recipe]], record: Record, model: str, source: Path, watch: Watcher) -> None:
    """Make every run, even if an earlier one fails."""
    dense = DensePass()
    for number, (row, recipe) in enumerate(runs, start=1):
        watch(Progress(f"run {number} of {len(runs)}: {row.name}"))
        # The pipeline checks that a finished run is unchanged.
        if row.state != "finished":
            record.note(replace(row, state="running", error=None))
        try:
            run = Run.begin(recipe, _numbered(watch, number, len(runs)), dense)
            with run.watch:
                _prune(run, model, source, record.folder / row.name, row)
        except HeldError:
            watch(Progress(f"run {number} of {len(runs)} is left to the process that makes it: {row.name}"))
        except ResumeError:
            # The user has changed something about an existing run: the record must keep its state.
            record.note(row)
            raise
        except LlmpruneError as error:
            record.note(replace(row, state="failed", error=_plain(error)))
            watch(Progress(f"run {number} of {len(runs)} failed: {error.what.splitlines()[0]}"))
        except KeyboardInterrupt:
            if row.state != "finished":
                record.note(replace(row, state="interrupted", error=None))
            raise
        else:
            record.note(replace(row, state="finished", error=None, outdated=False))


def _prune(run: Run, model: str, source: Path, folder: Path, row: SweepRow) -> None:
    """Make or continue one run; what a replaced sweep has begun was removed, so that what has begun is this run."""
    overwrite = row.outdated and not (folder / STAGING_NAME / MANIFEST_NAME).exists()
    prune_checkpoint(run, model, source, folder, resume=not overwrite, overwrite=overwrite)


def _numbered(watch: Watcher, number: int, total: int) -> Watcher:
    def numbered(stage: str) -> str:
        return f"{number}/{total} {stage}"

    def tell(progress: Progress) -> None:
        own = progress.shares and {numbered(stage): share for stage, share in progress.shares.items()}
        watch(replace(progress, stage=numbered(progress.stage), shares=own))

    return tell


def _compare(folder: Path, rows: Sequence[SweepRow], model: str | Path) -> Comparison | None:
    finished = [folder / row.name for row in rows if row.state == "finished"]
    return compare(finished, against=model) if finished else None


def _plain(error: LlmpruneError) -> dict[str, str]:
    return {"kind": type(error).__name__, "what": error.what, "expected": error.expected, "fix": error.fix}
