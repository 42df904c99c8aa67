"""What `llmprune recover` shows: the result, or what it would need."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

from llmprune.cli.console import facts
from llmprune.pages.recovered import recovered_facts, recovered_line
from llmprune.units import format_seconds, format_size, quantity

if TYPE_CHECKING:
    from llmprune.recovery.plan import RecoveryPlan
    from llmprune.storage.report import Report


def recovery_table(report: "Report", folder: str | Path) -> RenderableType:
    """The result of a recovery, and where it is."""
    return facts(
        ("recovered", str(folder)),
        ("what", recovered_line(report.header)),
        *recovered_facts(report.header["recovery"]),
        ("time", f"{format_seconds(report.header['seconds']['total'])} s"),
        ("report", str(Path(folder) / "report.html")),
    )


def plan_table(plan: "RecoveryPlan") -> RenderableType:
    """What a recovery would do and need."""
    held_back = f", and {plan.held_back:,} that are only scored" if plan.held_back else ""
    return facts(
        ("model", plan.model),
        *([("teacher", plan.teacher)] if plan.teacher else []),
        ("text", f"{quantity(plan.sequences, 'sequence')} of {plan.length:,} tokens{held_back}"),
        ("steps", f"{plan.steps:,}, unless it stops early"),
        (
            "time",
            f"{format_seconds(plan.seconds)} s at the pace of large matmuls (small ones take longer) of {plan.device}",
        ),
        ("memory", f"{format_size(plan.memory_bytes)} on each device"),
        ("disk", format_size(plan.disk_bytes)),
    )
