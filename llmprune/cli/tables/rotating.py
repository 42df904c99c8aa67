"""What `llmprune rotate` shows: the result, or what it would need."""

from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

from llmprune.cli.console import facts
from llmprune.units import format_seconds, format_size, quantity

if TYPE_CHECKING:
    from llmprune.pruning.rotation.plan import RotationPlan
    from llmprune.pruning.rotation.report import RotationReport


def rotation_table(report: "RotationReport", folder: Path) -> RenderableType:
    """The result of a rotation, and where it is."""
    logits, loss = report.logits, []
    if report.loss is not None:
        before, after = report.loss
        share = f"{exp(after - before):.1%} of what it would take without the rotation"
        loss = [("loss", f"pruning takes {share} (geometric mean over matrices), at step {report.best_step}")]
    return facts(
        ("rotated", str(folder)),
        ("what", _what(report)),
        *loss,
        ("logits", f"KL {logits.kl_divergence:.2e} nats/token from the dense ones, over {logits.tokens:,} tokens"),
        ("differences", f"root mean square {logits.relative:.3%}, largest {logits.largest:.3g}"),
        *_grown(report.untied_bytes),
        ("time", f"{format_seconds(sum(report.seconds.values()))} s"),
    )


def plan_table(plan: "RotationPlan") -> RenderableType:
    """What a rotation would do and need."""
    learned = []
    if plan.term_bytes:
        spilled = f", of which {format_size(plan.spilled_bytes)} on disk" if plan.spilled_bytes else ""
        learned = [
            ("read per step", f"{format_size(plan.term_bytes)} of weights and inverse Gram matrices{spilled}"),
            ("time", f"{format_seconds(plan.seconds)} s for all steps at least (matmuls only), on {plan.device}"),
        ]
    return facts(
        ("model", plan.model),
        ("what", _what(plan)),
        *_grown(plan.untied_bytes),
        ("calibration", f"{plan.tokens:,} tokens"),
        *learned,
        ("memory", f"{format_size(plan.memory_bytes)} and activations"),
        ("disk", format_size(plan.disk_bytes)),
    )


def _what(about: "RotationReport | RotationPlan") -> str:
    steps = quantity(about.options["steps"], "step")
    how = f"learned in {steps}" if about.options["kind"] == "learned" else about.options["kind"]
    values = f"values in {about.rotated_values} of {about.layers} layers" if about.rotated_values else "no values"
    return f"{about.hidden_size:,} hidden channels and {values}, {how}"


def _grown(nbytes: int) -> list[tuple[str, str]]:
    return [("untied", f"the LM head has weights of its own: {format_size(nbytes)} more")] if nbytes else []
