"""The recipe's section `rotation`: the residual stream is rotated before anything is pruned.

rotation: {steps: 500, untie: true}
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llmprune.recipe.fields import STRICT

RotationKind = Literal["learned", "hadamard", "random"]


class RotationOptions(BaseModel):
    """Rotate the residual stream, and the values of each KV head, before pruning; the model computes the same.

    Attributes:
        kind: learned (the entropy of the pruning scores is minimised), hadamard or random.
        steps: of the optimiser, at least 1; only for learned rotations.
        seed: of random and Hadamard rotations.
        untie: give the LM head weights of its own where it shares those of the embeddings, which takes their bytes.
    """

    model_config = STRICT

    kind: RotationKind = "learned"
    steps: Annotated[int, Field(ge=1)] = 200
    seed: Annotated[int, Field(ge=0)] = 0
    untie: bool = False
