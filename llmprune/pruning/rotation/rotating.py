"""The recipe key `rotation`: a rotated copy of the checkpoint, inside the output folder, is what is pruned."""

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError, ModelError, PatternError
from llmprune.patterns import Pattern
from llmprune.pruning.context import Run
from llmprune.pruning.rotation.rotate import Rotatable, RotationJob, open_rotatable, rotate_checkpoint
from llmprune.recipe.recipe import Recipe
from llmprune.text.tokens import Tokens
from llmprune.units import format_size

# It lives as long as the run is unfinished: one that is interrupted goes on with the same rotation.
_FOLDER = ".rotated"


@dataclass(frozen=True, slots=True, eq=False)
class Rotating:
    """A run that begins with a rotation.

    Attributes:
        job: what is asked for.
        rotatable: the dense checkpoint.
    """

    job: RotationJob
    rotatable: Rotatable

    @property
    def nbytes(self) -> int:
        """Size of the rotated checkpoint."""
        return self.rotatable.nbytes

    @property
    def note(self) -> str:
        """What a forecast of the run says about the rotation."""
        return (
            f"The rotation comes first: a rotated copy of the checkpoint ({format_size(self.nbytes)}) is in the output "
            "folder until the run is finished."
        )

    def rotate(self, run: Run, name: str, tokens: Tokens, staging: Path) -> dict[str, Any]:
        """Rotate into a folder inside the run's own, or find the rotated checkpoint of an interrupted run there.

        Args:
            run: its context.
            name: of the model, as the user gave it.
            tokens: the calibration text; its held-back sequences are left out.
            staging: the folder in which the result is made.

        Returns:
            The report of the rotation as plain data; the checkpoint is in `rotated_folder`.
        """
        counted = replace(tokens, ids=tokens.ids[: len(tokens.ids) - run.recipe.held_back])
        return rotate_checkpoint(
            name, self.rotatable, counted, rotated_folder(staging), self.job, resume=True, processes=run.ranks.size
        ).to_dict()


def begin_rotation(run: Run, folder: Path) -> tuple[Run, Rotating | None, tuple[str, ...]]:
    """Find the residual stream of a checkpoint, before any text is read.

    Returns:
        The run, whose recipe has no rotation if there is none; what rotates the model, or None; and a sentence for the
        report if the recipe has left a rotation out that is not possible.

    Raises:
        ModelError: a rotation would not be exact, or the embeddings are tied, and it is not optional.
        CheckpointError: the model is packed or pruned, likewise.
        PatternError: what the recipe prunes is no matrix that can be rotated, likewise.
    """
    options = run.recipe.rotation
    if options is None:
        return run, None, ()
    job = RotationJob(
        options,
        replace(run.settings, held_back=0),
        run.watch,
        partial(_pattern_of, run.recipe),
        run.recipe.decoder_layers,
        run.stages,
    )
    try:
        return run, Rotating(job, open_rotatable(folder, job)), ()
    except (ModelError, CheckpointError, PatternError) as error:
        if not options.optional:
            raise
        return run.unrotated(), None, (f"pruned without a rotation: {error.what}; it needs {error.expected}",)


def _pattern_of(recipe: Recipe, name: str) -> Pattern | None:
    """Which zeros a matrix will get; where the rotation has its own pattern, the recipe only says whether any."""
    asked = recipe.for_matrix(name)
    if asked is None or recipe.rotation is None:
        return None
    return (recipe.rotation.pattern or asked[0]).compared(asked[1].scope)


def rotated_folder(staging: Path) -> Path:
    """Where the rotated copy is while a run lasts."""
    return staging / _FOLDER


def discard_rotated(staging: Path) -> None:
    """Remove the rotated copy, which a finished result does not need."""
    shutil.rmtree(staging / _FOLDER, ignore_errors=True)
