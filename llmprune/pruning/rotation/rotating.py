"""The recipe key `rotation`: a rotated copy of the checkpoint, inside the output folder, is what is pruned."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmprune.patterns import Pattern
from llmprune.pruning.context import Run
from llmprune.pruning.rotation.rotate import Rotatable, RotationJob, open_rotatable, rotate_checkpoint
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

    @classmethod
    def begin(cls, run: Run, folder: Path) -> "Rotating | None":
        """Find the residual stream of a checkpoint, before any text is read; None if the recipe has no rotation.

        Raises:
            ModelError: a rotation would not be exact, or the embeddings are tied.
        """
        if run.recipe.rotation is None:
            return None
        options, settings = run.recipe.rotation, replace(run.settings, held_back=0)

        def pattern_of(name: str) -> Pattern | None:
            asked = run.recipe.for_matrix(name)
            return None if asked is None else (options.pattern or asked[0]).compared(asked[1].scope)

        job = RotationJob(options, settings, run.watch, pattern_of, run.recipe.decoder_layers, run.stages)
        return cls(job, open_rotatable(folder, job))

    @property
    def nbytes(self) -> int:
        """Size of the rotated checkpoint."""
        return self.rotatable.nbytes

    @property
    def note(self) -> str:
        """What a forecast of the run says about the rotation."""
        return (
            f"The rotation comes first, and a rotated copy of the checkpoint ({format_size(self.nbytes)}) is in the "
            "output folder until the run is finished. Its time and memory are not in these figures; "
            "llmprune rotate --dry-run has them."
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


def rotated_folder(staging: Path) -> Path:
    """Where the rotated copy is while a run lasts."""
    return staging / _FOLDER


def discard_rotated(staging: Path) -> None:
    """Remove the rotated copy, which a finished result does not need."""
    shutil.rmtree(staging / _FOLDER, ignore_errors=True)
