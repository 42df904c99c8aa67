"""The report of a training in stages: the curve of quality against sparsity, and what it cost."""

import datetime
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from llmprune.devices import describe_device, describe_host
from llmprune.measuring.inspection import inspect_checkpoint
from llmprune.measuring.perplexity import finite
from llmprune.storage.report import Report
from llmprune.torchrun import processes
from llmprune.training.stages import Plan

if TYPE_CHECKING:
    from llmprune.training.train import Training


def make_report(
    run: "Training",
    keys: dict[str, Any],
    state: TrainerState,
    plan: Plan,
    memory: dict[str, int],
    result: Path,
    measured: dict[str, Any] | None,
) -> Report:
    """Assemble the report.

    Args:
        run: what was asked for.
        keys: what the result depends on.
        state: of the Trainer, at its end.
        plan: its stages.
        memory: predicted and measured bytes.
        result: folder of the written checkpoint.
        measured: as the subject's `evaluate` returns it; None: nothing was measured.
    """
    subject, recipe = run.subject, run.recipe
    rows = [row for row in inspect_checkpoint(result).rows if len(row.shape) > 1]
    training = {
        "recipe": recipe.to_dict(),
        "name": recipe.name,
        "measure": subject.measure,
        "processes": processes(),
        "sequences": len(subject.rows) - subject.held_back,
        "held_back": subject.held_back,
        "length": subject.token_count,
        "steps": state.global_step,
        "curve": curve(state, plan, subject.measure),
        "losses": [
            {key: finite(entry[key]) if key != "step" else entry[key] for key in ("step", "loss", "learning_rate")}
            for entry in state.log_history
            if "loss" in entry
        ],
        "zeros": {"count": sum(row.zeros for row in rows), "weights": sum(row.elements for row in rows)},
        **{key: value for key, value in (measured or {}).items() if key != "evaluation"},
    }
    header = {
        "model": run.name,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "source": keys["source"],
        "tokens": {"training": subject.digest},
        "texts": {"training": {**subject.text, "digest": subject.digest}},
        "version": keys["version"],
        "device": describe_device(subject.device),
        "host": describe_host(subject.device),
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "seconds": {"total": time.perf_counter() - run.started, **run.stages.seconds},
        "memory": memory,
        "evaluation": (measured or {}).get("evaluation"),
        "training": training,
    }
    return Report((), header)


def curve(state: TrainerState, plan: Plan, measure: str) -> list[dict[str, Any]]:
    """The quality on held-back rows before the first step and after each stage; empty if none are held back.

    Each point has "stage" (None before the first), "step", the "sparsity" of the matrices that are pruned, "loss", and
    the measure by its name.
    """
    ends = {stage.end: stage.number for stage in plan.stages}
    return [
        {
            "stage": ends.get(entry["step"]),
            "step": entry["step"],
            "sparsity": entry["eval_sparsity"],
            "loss": finite(entry["eval_loss"]),
            measure: finite(entry[f"eval_{measure}"]),
        }
        for entry in state.log_history
        if "eval_sparsity" in entry
    ]
