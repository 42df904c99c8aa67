"""The report of a training in stages: the curve of quality against sparsity, and what it cost."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from llmprune.devices import describe_device, describe_host
from llmprune.measuring.perplexity import finite
from llmprune.pages.beside import stored_bytes
from llmprune.pages.labels import methods_of
from llmprune.recovery.counting import counted_row
from llmprune.storage.report import MatrixRow, Report
from llmprune.torchrun import processes
from llmprune.training.recipe import TrainRecipe
from llmprune.training.rules import SoftMovement
from llmprune.training.stages import Plan
from llmprune.training.subjects.subject import Subject
from llmprune.training.targets import find_targets

# By so much a sparsity may differ from what was asked for without a word.
_NEAR = 0.01

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
    rows = pruned_rows(subject, recipe)
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
        "zeros": {"count": sum(row.zeros for row in rows), "weights": sum(row.shape[0] * row.shape[1] for row in rows)},
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
        "notes": notes(recipe, Report(rows).sparsity),
        "seconds": run.stages.spent(),
        "memory": memory,
        "size": {"stored_bytes": stored_bytes(result), "dense_bytes": stored_bytes(subject.folder)},
        "evaluation": (measured or {}).get("evaluation"),
        "training": training,
    }
    return Report(rows, header)


def pruned_rows(subject: Subject, recipe: TrainRecipe) -> tuple[MatrixRow, ...]:
    """The matrices that a recipe prunes, their zeros counted in the model as it is stored."""
    pattern = recipe.selection.pattern
    asked = f"{recipe.schedule.end:g}" if recipe.method else f"{recipe.schedule.end:g}/{recipe.selection.scope}"
    dtypes = subject.stored_dtypes()
    return tuple(
        counted_row(
            target.name.removesuffix(f".{target.matrix.parameter}"), target.matrix, target.parameter,
            dtypes[target.name], pattern=str(pattern or asked), method=methods_of(recipe.rule_name or recipe.method),
        )
        for target in find_targets(subject.model, recipe.include, recipe.exclude)
    )  # fmt: skip


def notes(recipe: TrainRecipe, sparsity: float) -> list[str]:
    """What is not as asked for: soft movement need not end with the zeros of its schedule, as all else does.

    Args:
        recipe: what was asked for.
        sparsity: of the matrices that it prunes, counted.
    """
    asked = recipe.schedule.end
    if not isinstance(recipe.rule, SoftMovement) or abs(sparsity - asked) < _NEAR:
        return []
    way = "raise strength or threshold, or train longer" if sparsity < asked else "lower strength or threshold"
    return [
        f"{sparsity:.1%} of the weights are zero, and the schedule ends at {asked:.1%}: {recipe.name} prunes what its "
        f"penalty drives below its threshold, however much that is; {way}"
    ]


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
