"""The decision step: what the recipe leaves open is decided once, from the dense model, and recorded."""

from llmprune.pruning.context import Run
from llmprune.storage.output import OutputFolder
from llmprune.structures.decisions import Decisions
from llmprune.structures.removable import Removable
from llmprune.structures.survey import decide
from llmprune.text.tokens import Tokens


def decide_run(run: Run, found: Removable | None, target: OutputFolder, tokens: Tokens) -> Decisions | None:
    """Decide what is removed and how individual matrices are pruned, or read what an interrupted run decided.

    Args:
        run: its context.
        found: what can be removed; None: nothing is removed.
        target: where decisions are recorded, so that a resumed run decides the same.
        tokens: the calibration text.

    Returns:
        The decisions; None if the recipe leaves nothing open.
    """
    if target.decisions is None and found is not None:
        with run.stages("survey"):
            target.decide(decide(found, tokens.ids, run.settings, run.stages, run.watch).to_dict())
    return None if target.decisions is None else Decisions.from_dict(target.decisions)
