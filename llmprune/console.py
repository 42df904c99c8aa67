"""What the command line shows: the progress of a run on stderr, and its results as tables that fit 80 columns."""

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmprune.errors import LlmpruneError
from llmprune.progress import Progress

if TYPE_CHECKING:
    from llmprune.dry_run import DryRun, LayerPlan
    from llmprune.inspection import Inspection, TensorRow
    from llmprune.perplexity import Perplexity
    from llmprune.report import Report

# Longer lists of matrices are shown layer by layer.
_LONG = 32

_NUMBERED = re.compile(r"^(.*?\.\d+)\.(.+)$")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


class Pace:
    """How long a stage still takes, from the mean time of its finished layers."""

    def __init__(self) -> None:
        self._stage = ""
        self._layer = self._layers = 0
        self._since = 0.0
        self._seconds: list[float] = []
        self.replaying = False

    def update(self, progress: Progress, now: float) -> float | None:
        """Note a step at the time `now`; returns the seconds that a layer took if this step ended it."""
        seconds = None
        if progress.stage != self._stage:
            self._seconds, self.replaying = [], False
        elif progress.layer == self._layer:
            self.replaying = self.replaying or progress.step == "replaying"
            return None
        else:
            seconds = now - self._since
            # A layer that an earlier run has finished takes a fraction of the time, and says nothing about the others.
            if not self.replaying:
                self._seconds.append(seconds)
        self._stage, self._layer, self._layers, self._since = progress.stage, progress.layer, progress.layers, now
        self.replaying = progress.step == "replaying"
        return seconds

    def left(self, now: float) -> float | None:
        """Seconds to the end of the stage; None before its first layer is finished, and after its last."""
        layers = self._layers - self._layer
        if not self._seconds or not layers:
            return None
        mean = sum(self._seconds) / len(self._seconds)
        return max(mean * layers - (now - self._since), 0.0)


class Display:
    """The one display of a run: live on a terminal, one line a layer elsewhere, nothing when quiet.

    Attributes:
        progress: the last step seen; None before the first.
    """

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._clock, self._pace = clock, Pace()
        self._silent = quiet
        self.progress: Progress | None = None
        self._live = None
        if self._console.is_terminal and not quiet:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=8,
                transient=True,
                redirect_stdout=False,
            )

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one step."""
        replayed, now = self._pace.replaying, self._clock()
        seconds = self._pace.update(progress, now)
        self.progress = progress
        if self._live:
            # Not before the first step: the bars of a download come first.
            self._live.start()
        elif self._silent:
            return
        elif progress.layers == 0:
            self._console.print(progress.stage, soft_wrap=True)
        elif seconds is not None:
            finished = f"{progress.stage}: layer {progress.layer} of {progress.layers}"
            finished += " kept from the earlier run" if replayed else f" in {seconds:.1f} s"
            parts = (finished, _mean_error(progress), _eta(self._pace.left(now)))
            self._console.print(", ".join(filter(None, parts)), soft_wrap=True)

    def where(self) -> str:
        """The stage and layer at hand, in words; empty before the first."""
        return "" if self.progress is None else ", ".join(filter(None, (self.progress.stage, _layer(self.progress))))

    def _render(self) -> RenderableType:
        progress = self.progress
        if progress is None:
            return Text()
        first = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None):
            first.add_column(no_wrap=True, ratio=ratio)
        bar = ProgressBar(total=progress.layers or None, completed=progress.layer, pulse=not progress.layers)
        first.add_row(Text(progress.stage, "bold"), bar, _layer(progress), _eta(self._pace.left(self._clock())))
        details = "  ".join(filter(None, (progress.step, _mean_error(progress))))
        return Group(first, Text(f"  {details}", "dim", no_wrap=True, overflow="ellipsis"))


def show(*renderables: RenderableType) -> None:
    """Print results on stdout."""
    console = Console(highlight=False, markup=False)
    for renderable in renderables:
        console.print(renderable)


def show_json(content: Any) -> None:
    """Print plain data on stdout as JSON, and nothing else."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def tell(message: str) -> None:
    """Print one line on stderr."""
    Console(stderr=True, highlight=False, markup=False).print(message, soft_wrap=True)


def show_error(error: LlmpruneError) -> None:
    """Say on stderr what happened, what was expected and how to fix it."""
    console = Console(stderr=True, highlight=False, markup=False)
    console.print(Text(f"Error: {error.what}", "bold red"), soft_wrap=True)
    for label, text in (("expected", error.expected), ("fix", error.fix)):
        if text:
            console.print(Text.assemble((f"{label}: ", "bold"), text), soft_wrap=True)


def report_table(report: "Report", folder: Path) -> RenderableType:
    """The end of a run: what it cost, in quality and in time, and where the details are."""
    header = report.header
    climbed = sum(len(row.damping_tried) > 1 for row in report.rows)
    priors = sum(row.prior_tokens > 0 for row in report.rows)
    stages = [f"{stage} {_seconds(value)}" for stage, value in header["seconds"].items() if stage != "total"]
    memory = header["memory"]
    error = "not measured" if report.mean_error is None else f"{report.mean_error:.4f} of the output's energy"
    return _facts(
        ("model", header["model"]),
        *_evaluation_facts(header["evaluation"]),
        ("sparsity", f"{report.sparsity:.2%} of {len(report.rows)} matrices"),
        ("mean error", error),
        ("raised damping", f"{climbed} matrices"),
        ("expert priors", f"{priors} matrices"),
        ("seconds", f"{_seconds(header['seconds']['total'])}: {', '.join(stages)}"),
        ("peak memory", f"{_size(memory['predicted_bytes'])} predicted, {_size(memory['measured_bytes'])} measured"),
        ("report", str(folder / "report.json")),
    )


def perplexity_table(result: "Perplexity", run: dict[str, Any]) -> RenderableType:
    """One measurement with its protocol."""
    return _facts(
        ("model", run["model"]),
        ("perplexity", f"{result.perplexity:.4f}"),
        ("nats a token", f"{result.nats:.5f}"),
        ("text", str(result.text["source"])),
        ("protocol", f"{result.samples} chunks of {result.length}, {result.predicted_tokens:,} predicted tokens"),
        ("tokens", f"sha256 {result.tokens_digest}"),
        ("computed", f"in {run['compute_dtype']} on {run['device']} in {_seconds(run['seconds'])} s"),
    )


def recipes_table(recipes: Iterable[tuple[str, str]]) -> RenderableType:
    """The bundled recipes, one line each."""
    return _facts(*recipes)


def inspection_tables(inspection: "Inspection", *, every: bool) -> list[RenderableType]:
    """The matrices of a checkpoint, layer by layer where they are many and `every` is false, and the totals."""
    rows = [row for row in inspection.rows if row.pattern is not None]
    others = [row for row in inspection.rows if row.pattern is None]
    layers: dict[str, list[TensorRow]] = {}
    for row in rows:
        match = _NUMBERED.match(row.name)
        layers.setdefault(match[1] if match else "", []).append(row)
    table = _table("tensor", "shape", "dtype", "zeros", "pattern", "size", left=(0, 2, 4))
    for layer, inside in layers.items():
        if layer and not every and len(rows) > _LONG:
            table.add_row(*_layer_row(layer, inside))
            continue
        if layer:
            table.add_row(Text(layer, "bold"))
        for row in inside:
            table.add_row(*_tensor_row(row, indented=bool(layer)))
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in Counter(row.dtype for row in others).most_common())
    negative = sum(row.negative_zeros for row in inspection.rows)
    totals = _facts(
        ("checkpoint", f"{inspection.folder}, {_size(inspection.bytes_on_disk)}"),
        ("parameters", f"{inspection.parameters:,}, of them {inspection.nonzeros:,} not zero"),
        ("zeros", f"{inspection.sparsity:.2%} of all, {inspection.matrix_sparsity:.2%} of the matrices in the layers"),
        ("not listed", f"{len(others)} vectors and other tensors: {kinds}" if others else "nothing"),
        *([("zeros stored as -0.0", f"{negative:,}")] if negative else []),
    )
    return [table, totals]


def dry_run_tables(plan: "DryRun") -> list[RenderableType]:
    """What would be done, how long it takes, and what it needs."""
    head = _facts(
        ("model", plan.model),
        ("device", f"{plan.device}, computing in {plan.compute_dtype}"),
        ("tokens", f"{plan.tokens:,} for calibration, the held-back ones included"),
        ("sparsity", f"{plan.sparsity:.2%} of the matrices that are pruned"),
        ("disk", _disk(plan)),
    )
    notes = [Text(note) for note in plan.notes]
    return [head, _plan_table(plan), _work_table(plan), _memory_table(plan), *notes]


def spans(numbers: Sequence[int]) -> str:
    """Write ascending numbers with their runs joined: "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _evaluation_facts(evaluation: dict[str, Any] | None) -> list[tuple[str, str]]:
    if evaluation is None:
        return [("perplexity", "not measured (evaluation: null)")]
    dense, pruned = evaluation["dense"], evaluation["pruned"]
    text = "text that the model wrote" if dense["text"]["source"] == "self" else dense["text"]["source"]
    return [
        ("perplexity", f"{dense['perplexity']:.4f} dense, {pruned['perplexity']:.4f} pruned"),
        ("", f"on {dense['predicted_tokens']:,} tokens of {text}, in chunks of {dense['length']}"),
        ("KL divergence", f"{evaluation['kl_divergence']:.4f} nats a token"),
        ("same top token", f"{evaluation['agreement']:.1%}"),
    ]


def _layer_row(layer: str, rows: Sequence["TensorRow"]) -> tuple[str, ...]:
    zeros, elements = sum(row.zeros for row in rows), sum(row.elements for row in rows)
    patterns = Counter(str(row.pattern) for row in rows).most_common()
    named = ", ".join(f"{count} x {pattern}" if len(patterns) > 1 else pattern for pattern, count in patterns[:3])
    return (
        layer,
        f"{len(rows)} matrices",
        ", ".join(dict.fromkeys(row.dtype for row in rows)),
        f"{zeros / max(elements, 1):.2%}",
        named + (", ..." if len(patterns) > 3 else ""),
        _size(sum(row.bytes for row in rows)),
    )


def _tensor_row(row: "TensorRow", *, indented: bool) -> tuple[str, ...]:
    name = "  " + _NUMBERED.sub(r"\2", row.name) if indented else row.name
    shape = " x ".join(map(str, row.shape))
    return name, shape, row.dtype, f"{row.sparsity:.2%}", str(row.pattern), _size(row.bytes)


def _plan_table(plan: "DryRun") -> Table:
    table = _table("matrix", "shape", "pattern", "method", "zeros", left=(0, 2, 3))
    for layer in plan.layers:
        table.add_row(Text(f"{plan.layers_path}.{spans(layer.indices)}", "bold"))
        for name, (shape, pattern, method), zeros in _merged(layer):
            table.add_row(f"  {name}", f"{shape[0]} x {shape[1]}", pattern, method or "", f"{zeros:,}")
    return table


def _merged(layer: "LayerPlan") -> list[tuple[str, tuple[tuple[int, int], str, str | None], int]]:
    """The matrices of a layer, with equal ones of its experts in one row."""
    rows: dict[Any, list[Any]] = {}
    for matrix in layer.matrices:
        what = matrix.shape, matrix.pattern, matrix.method
        rows.setdefault((_EXPERT.sub("*", matrix.name), what), []).append(matrix)
    merged = []
    for (name, what), matrices in rows.items():
        numbers = [int(found[0]) for matrix in matrices if (found := _EXPERT.search(matrix.name))]
        merged.append((name.replace("*", spans(numbers)), what, sum(matrix.zeros for matrix in matrices)))
    return merged


def _work_table(plan: "DryRun") -> Table:
    table = _table("matrix products", "GFLOP", "GFLOP/s here", "seconds", left=(0,))
    work, rates, seconds = plan.work, plan.rates, plan.seconds
    for name, done, rate, duration in (
        ("two forwards", work.forward, rates.forward, seconds.forward),
        ("Gram matrices", work.gram, rates.gram, seconds.gram),
        ("solving", work.solve, rates.solve, seconds.solve),
    ):
        table.add_row(name, f"{done / 1e9:,.1f}", f"{rate / 1e9:,.0f}", _seconds(duration))
    table.add_row(Text("at least", "bold"), f"{work.total / 1e9:,.1f}", "", Text(_seconds(seconds.total), "bold"))
    return table


def _memory_table(plan: "DryRun") -> Table:
    memory, layer = plan.memory, plan.memory.layer
    table = _table("memory", "size", left=(0,))
    for name, nbytes in (
        ("ends (embeddings, norm, head)", memory.ends),
        ("hidden states", memory.hidden_states),
        ("masks and rotary embeddings", memory.calls),
        ("weights of one layer", layer.weights),
        ("statistics", layer.statistics),
        ("held-back rows", layer.held_back),
        ("forward", layer.forward),
        ("solving", layer.solving),
    ):
        table.add_row(name, _size(nbytes))
    table.add_row(Text("predicted peak", "bold"), Text(_size(memory.peak), "bold"))
    return table


def _disk(plan: "DryRun") -> str:
    spilled = (
        f", and {_size(plan.spilled_bytes)} of hidden states in the temporary folder" if plan.spilled_bytes else ""
    )
    return f"{_size(plan.disk_bytes)} for the pruned checkpoint{spilled}"


def _facts(*facts: tuple[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def _table(*columns: str, left: tuple[int, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in left else "right", overflow="fold", no_wrap=index == 1)
    return table


def _layer(progress: Progress) -> str:
    """The layer at hand, counted from 1; empty for a step without layers."""
    return f"layer {min(progress.layer + 1, progress.layers)} of {progress.layers}" if progress.layers else ""


def _mean_error(progress: Progress) -> str:
    return "" if progress.mean_error is None else f"mean error {progress.mean_error:.4f}"


def _eta(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"ETA {hours}:{minutes:02d}:{rest:02d}" if hours else f"ETA {minutes}:{rest:02d}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _size(nbytes: float) -> str:
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    power = min(int(math.log10(nbytes)) // 3, 4)
    return f"{nbytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
