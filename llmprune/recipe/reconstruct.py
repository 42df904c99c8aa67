"""The recipe's section `reconstruct`: fit each layer as a whole after its matrices are solved.

reconstruct: {target: corrected, epochs: 10, lr: 3e-4}
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator

from llmprune.errors import RecipeError
from llmprune.recipe.document import refusal
from llmprune.recipe.fields import MOST, STRICT
from llmprune.stream.matching import Matching, Trained

Target = Literal["dense", "local", "corrected"]
Windowed = Literal["layer", "attention+mlp"]


class Reconstruct(BaseModel):
    """Block matching.

    Attributes:
        window: layer (all that is trained at once, on the layer's output) or attention+mlp (what lies in the attention
            first, on the layer's output without its MLP, then the rest, on the layer's output: less memory, and an
            error a part).
        target: what a layer is fitted to: dense (run on the dense model's hidden states, reproduce the dense layer's
            outputs on them), local (on those of the pruned model, the dense layer's outputs on the same), corrected (on
            those of the pruned model, the dense model's outputs: earlier layers' errors are corrected, too).
        epochs: passes over the calibration sequences at most, at least 1; the validation sequences decide.
        lr: highest learning rate of Adam, in (0, 1]; reached after a tenth of the steps, then it falls along a cosine.
        sequences: calibration sequences a step, at least 1.
        train: weights (those that were pruned and kept), norms (their gains), biases.
    """

    model_config = STRICT

    window: Windowed = "layer"
    target: Target = "corrected"
    epochs: Annotated[int, Field(ge=1, le=MOST)] = 10
    lr: Annotated[float, Field(gt=0, le=1)] = 3e-4
    sequences: Annotated[int, Field(ge=1, le=MOST)] = 8
    train: tuple[Trained, ...] = ("weights", "norms", "biases")

    @field_validator("train")
    @classmethod
    def _check_train(cls, value: tuple[Trained, ...]) -> tuple[Trained, ...]:
        if not value or len(set(value)) < len(value):
            error = RecipeError(
                f"reconstruct.train is {list(value)}", expected="some of weights, norms and biases, each once"
            )
            raise refusal(error)
        return value

    @property
    def hidden_sets(self) -> int:
        """Sets of hidden states in memory or on disk: the pruned model's, what layers run on, what they should return.

        A layer's outputs replace its inputs only where nobody needs the inputs any more.
        """
        return (3 if self.target == "dense" else 2) + (self.window == "attention+mlp")

    @property
    def matching(self) -> Matching:
        """As the stream takes it."""
        return Matching(self.epochs, self.lr, self.sequences, self.train)
