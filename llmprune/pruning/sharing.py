"""What several processes cannot share is refused: by one process, and before any text is sampled or read."""

from collections.abc import Mapping
from typing import Any

from llmprune.devices import resolve_device, same_but_threads
from llmprune.errors import DeviceError, RecipeError
from llmprune.pruning.context import require_runnable
from llmprune.ranks import Ranks, require_gpus
from llmprune.recipe.recipe import Recipe
from llmprune.stream.stream import StreamSettings, require_batches

_SPELLED = {"source": "checkpoint", "version": "set of versions"}


def require_startable(recipe: Recipe, processes: int, here: int) -> None:
    """Refuse to share a run out over so many processes, as far as that can be said without the model.

    Args:
        recipe: of the run.
        processes: how many share it.
        here: how many of them are on this machine.

    Raises:
        LlmpruneError: as for `require_shareable`, or there is not a GPU for each.
    """
    require_runnable(recipe)
    require_gpus(recipe.device, here)
    require_shareable(recipe, processes)


def require_shareable(recipe: Recipe, processes: int) -> None:
    """Refuse what depends on the order in which one process sees the text, and more processes than batches.

    Args:
        recipe: of the run; its calibration text may have fewer sequences than it says.
        processes: how many share the run.

    Raises:
        RecipeError: names the key.
        CalibrationError: some processes would have nothing to do.
    """
    if processes == 1:
        return
    if recipe.statistics.token_weight == "clip":
        raise RecipeError(
            f"statistics.token_weight: clip in {processes} processes",
            expected="normalise or none: clip is measured on the first sequence, which only one process has",
            fix="set statistics.token_weight: normalise, or prune in one process",
        )
    settings = StreamSettings(batch_size=recipe.batch_size, held_back=recipe.held_back, ranks=Ranks(0, processes))
    sequences = recipe.fitted(None, resolve_device(recipe.device).type).calibration.sequences
    require_batches(settings, sequences + recipe.held_back)


def require_same(first: Mapping[str, Any], own: Mapping[str, Any], rank: int) -> None:
    """Refuse to add up what processes have computed of other models, or with other libraries or processors.

    Args:
        first: what the result of the first process depends on.
        own: what that of this one depends on.
        rank: of this process.

    Raises:
        DeviceError: names what differs, apart from the number of threads.
    """
    for key, expected in first.items():
        if own[key] == expected or (key == "device" and same_but_threads(own[key], expected)):
            continue
        raise DeviceError(
            f"process {rank} has another {_SPELLED.get(key, key)} than the first one: {own[key]} instead of {expected}",
            expected="the same checkpoint, versions and kind of processor: each process decides some things by itself",
            fix="use a folder that all machines share, or the same revision on each, and the same environment",
        )
