"""The recipe's section `rotation`: the residual stream is rotated before anything is pruned.

rotation: {steps: 500, untie: true}
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from llmprune.errors import RecipeError
from llmprune.recipe.document import refusal
from llmprune.recipe.fields import MOST, STRICT, PatternField

RotationKind = Literal["learned", "hadamard", "random"]


class RotationOptions(BaseModel):
    """Rotate the residual stream, and the values of each KV head, before pruning; the model computes the same.

    Attributes:
        kind: learned (so that pruning takes as little as possible), hadamard or random.
        steps: of the optimiser, at least 1; only for learned rotations.
        pattern: the zeros that a rotation is learned for; None: those of the recipe, and 2:4 without a recipe.
        seed: in [0, 2^63); only of random and Hadamard rotations.
        untie: give the LM head weights of its own where it shares those of the embeddings, which takes their bytes.
        optional: prune without a rotation, and say why, where it would not be exact; else that is an error.
    """

    model_config = STRICT

    kind: RotationKind = "learned"
    steps: Annotated[int, Field(ge=1, le=MOST)] = 200
    pattern: PatternField | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    untie: bool = False
    optional: bool = False

    @model_validator(mode="after")
    def _check_effect(self) -> "RotationOptions":
        for key in ("seed",) if self.kind == "learned" else ("steps", "pattern"):
            # Written recipes hold every key, so that defaults say nothing about what was wanted.
            if getattr(self, key) == type(self).model_fields[key].default:
                continue
            only = "random and Hadamard rotations" if key == "seed" else "learned rotations"
            error = RecipeError(
                f"{key} has no effect on a rotation of the kind {self.kind}",
                expected=f"{key} only for {only}",
                fix=f"remove {key}, or change the kind",
            )
            raise refusal(error, key)
        return self
