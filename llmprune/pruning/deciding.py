"""The decision step: what the recipe leaves open is decided once, from the dense model, and recorded."""

from dataclasses import replace
from typing import Any

from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pruning.allocating.allocate import allocate, allocate_unmeasured
from llmprune.pruning.context import Run
from llmprune.pruning.jobs import plan_jobs
from llmprune.recipe.allocation import Uniform
from llmprune.storage.output import OutputFolder
from llmprune.structures.decisions import Decisions
from llmprune.structures.reduction import Reduction
from llmprune.structures.removable import Removable
from llmprune.structures.survey import decide
from llmprune.text.tokens import Tokens


def decide_run(
    run: Run, source: CheckpointSource, found: Removable | None, target: OutputFolder, tokens: Tokens
) -> Decisions | None:
    """Decide what is removed and how individual matrices are pruned, or read what an interrupted run decided.

    Args:
        run: its context.
        source: the dense model.
        found: what can be removed; None: nothing is removed.
        target: where decisions are recorded, so that a resumed run decides the same.
        tokens: the calibration text.

    Returns:
        The decisions; None if the recipe leaves nothing open.
    """
    if target.decisions is None:

        def decided() -> dict[str, Any] | None:
            decisions = _decided(run, source, found, tokens)
            return None if decisions is None else decisions.to_dict()

        if (content := run.ranks.once(decided)) is not None:
            target.decide(content)
    return None if target.decisions is None else Decisions.from_dict(target.decisions)


def _decided(run: Run, source: CheckpointSource, found: Removable | None, tokens: Tokens) -> Decisions | None:
    decisions = None
    if found is not None:
        with run.stages("survey"):
            decisions = decide(found, tokens.ids, run.settings, run.stages, run.watch)
    if isinstance(run.recipe.allocation, Uniform):
        return decisions
    if found is None or decisions is None:
        decisions = Decisions(tuple(range(len(source.layers))), {})
        allocated = allocate(run, source, plan_jobs(source, run.recipe), tokens.ids)
    else:
        result = Reduction(found, decisions).result
        allocated = allocate_unmeasured(run, result, plan_jobs(result, run.recipe))
    evidence = {**decisions.evidence, "allocation": allocated.record}
    return replace(decisions, matrices=allocated.choices, evidence=evidence)
