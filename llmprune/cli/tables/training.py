"""What `llmprune train` shows: the result with its curve, or what it would need."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from llmprune.cli.console import facts, new_table
from llmprune.pages.trained import curve_rows, trained_facts, trained_line
from llmprune.units import format_seconds, format_size, quantity

if TYPE_CHECKING:
    from llmprune.storage.report import Report
    from llmprune.training.forecast import TrainingPlan


def training_table(report: "Report", folder: str | Path) -> RenderableType:
    """The result of a training, and where it is."""
    training = report.header["training"]
    shown = facts(
        ("trained", str(folder)),
        ("what", trained_line(report)),
        *(("note", note) for note in report.notes),
        *trained_facts(training),
        ("time", f"{format_seconds(report.header['seconds']['total'])} s"),
        ("report", str(Path(folder) / "report.html")),
    )
    if not training["curve"]:
        return shown
    points = new_table("stage", "step", "sparsity", "loss", training["measure"], left=(0,))
    for row in curve_rows(training["curve"], training["measure"]):
        points.add_row(*row)
    return Group(points, shown)


def plan_table(plan: "TrainingPlan") -> RenderableType:
    """What a training would do and need."""
    stages = new_table("stage", "sparsity", "steps", left=(0,))
    for one in plan.stages:
        stages.add_row(str(one["stage"] or "dense"), f"{one['sparsity']:.1%}", f"{one['steps']:,}")
    held_back = f", and {plan.held_back:,} that are only scored" if plan.held_back else ""
    return Group(
        stages,
        facts(
            ("model", plan.model),
            ("text", f"{quantity(plan.sequences, 'sequence')} of {plan.length:,} tokens{held_back}"),
            ("steps", f"{plan.steps:,}"),
            (
                "time",
                f"{format_seconds(plan.seconds)} s at the pace of large matmuls (small ones take longer) of "
                f"{plan.device}",
            ),
            ("memory", f"{format_size(plan.memory_bytes)} on each device"),
            ("disk", format_size(plan.disk_bytes)),
        ),
    )
