"""The small sections of a recipe: rules, statistics, quantisation and experts."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from llmprune.errors import RecipeError
from llmprune.methods.quantise import Bits, Quantiser
from llmprune.recipe.document import refusal
from llmprune.recipe.fields import MOST, STRICT, GlobField, MethodField, PatternField
from llmprune.stream.weighting import LossWeight, TokenWeight


class Rule(BaseModel):
    """A different pattern, method, or both for some matrices.

    Attributes:
        match: shell glob over full matrix names.
        pattern: None keeps the recipe's.
        method: None keeps the recipe's.
    """

    model_config = STRICT

    match: GlobField
    pattern: PatternField | None = None
    method: MethodField | None = None

    @model_validator(mode="after")
    def _check(self) -> "Rule":
        if self.pattern is None and self.method is None:
            error = RecipeError(
                f"the rule for {self.match!r} changes nothing",
                expected="pattern, method or both",
                fix="add one, or list the glob under exclude if these matrices should stay dense",
            )
            raise refusal(error)
        return self


class Experts(BaseModel):
    """Settings for the experts of MoE layers.

    Attributes:
        min_tokens: tokens, at least 0, that an expert must receive before its statistics are trusted.
    """

    model_config = STRICT

    min_tokens: Annotated[int, Field(ge=0, le=MOST)] = 64


class Quantise(BaseModel):
    """The pruned matrices are quantised as well: zeros first, then the weights that are kept, errors compensated.

    Attributes:
        bits: 8 or 4 for each weight.
        group: consecutive columns that share a scale in a row, at least 1, or row (all of them). CPU kernels serve
            multiples of 128, and row.
        damping: added to the diagonal of the inputs' Gram matrix, as a fraction of its mean, at least 0.
    """

    model_config = STRICT

    bits: Bits = 8
    group: Annotated[int, Field(ge=1, le=MOST)] | Literal["row"] = 128
    damping: Annotated[float, Field(ge=0, le=MOST)] = 0.01

    @property
    def quantiser(self) -> Quantiser:
        """As matrices are quantised by it."""
        return Quantiser(self.bits, None if self.group == "row" else self.group, self.damping)


class StatisticsOptions(BaseModel):
    """How the inputs of matrices enter the statistics.

    Attributes:
        token_weight: none; clip (tokens above twice the usual root mean square are scaled down to it); normalise (every
            token is scaled to the same root mean square).
        loss_weight: none; tokens (the statistics are half plain, and half weighted by how much the loss depends on a
            layer's output at each token; takes a backward pass of the dense model).
        sequential: collect the statistics of a matrix after the matrices before it in its layer are pruned, rather than
            those of the whole layer at once; the layer is run once for each of its inputs (about four times).
        alpha: part of the errors of earlier matrices that solvers correct, in [0, 1]: with X the inputs in the dense
            model and X' those in the pruned one, they aim at W + alpha W (X - X') X'^T (X' X'^T)^-1 instead of W. Takes
            a second set of hidden states. Routed experts, whose tokens differ between both models, keep W.
    """

    model_config = STRICT

    token_weight: TokenWeight = "normalise"
    loss_weight: LossWeight = "none"
    sequential: bool = False
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
