"""Measure the error that each level of each structure causes, in one pass over the dense model.

The greedy search of `structures.remove.solver` gives each structure the curve of its consumer's relative output error:
groups are removed one after another, and everything else is refitted. Then the structure alone is pruned to a reference
level, and the resulting hidden states are carried through all later layers alongside the dense ones; at the end the KL
divergence of the logits is measured. Each structure has its own hidden states for the validation sequences, so a pass
costs about structures * layers / 2 forwards of a layer over them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.errors import NumericsError, PatternError
from llmprune.models.decoder import Matrix
from llmprune.models.source import Source, eager_experts
from llmprune.statistics import Gram
from llmprune.stream.observation import Group
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.stream.variants import Variants, with_weights
from llmprune.structures.choose.budget import BudgetPlan, Measured, Offer, allowed_size, choose_widths
from llmprune.structures.remove.block_matrices import loss
from llmprune.structures.remove.problem import GroupRemoval, RemovalSettings
from llmprune.structures.remove.solver import remove_groups
from llmprune.timing import Stages

# Below this relative output error, a level changes the logits by little more than rounding does.
_LEAST_LOSS = 1e-4

_FIX = "remove the same fraction of every layer instead of spreading a budget"


@dataclass(frozen=True, slots=True, eq=False)
class _Variant:
    """The model in which one structure is pruned to its reference level."""

    layer: int
    offer: Offer
    curve: tuple[float, ...]
    reference: int


class BudgetSurvey:
    """Measures, in one pass over the dense model, the error that each level of each structure causes.

        survey = BudgetSurvey(source, offers, removed, validation_ids, settings)
        for layer in Stream(source, ids, settings):
            survey.see(layer)
        plan = survey.result()

    Args:
        source: the dense model, the one being streamed.
        offers: for each decoder layer, the structures that share the budget.
        remove: how much to remove from them, in the unit of their sizes, > 0.
        validation: tokens [samples, length] not used for statistics, on which the KL divergences are measured.
        settings: device, batch size and the memory shared by the hidden states of all variants.
        damping: of the Hessian, as for `RemovalSettings`.
        stages: stopwatch; a new one by default.

    Raises:
        PatternError: that much cannot be removed, no structure can lose groups, or there is not one list per layer.
        ModelError: the model cannot be streamed.
    """

    def __init__(
        self,
        source: Source,
        offers: Sequence[Sequence[Offer]],
        remove: float,
        validation: Tensor,
        settings: StreamSettings | None = None,
        damping: float = 0.01,
        stages: Stages | None = None,
    ) -> None:
        self._open = [[offer for offer in own if len(offer.levels) > 1] for own in offers]
        every = [offer for own in self._open for offer in own]
        if len(offers) != len(source.layers) or not every:
            raise PatternError(
                f"{len(every)} structures that can lose groups, in {len(offers)} of {len(source.layers)} layers",
                expected="a list for each layer, and at least one such structure",
                fix="lower the multiple, or raise most",
            )
        self._budget = allowed_size(every, remove)
        self._removal = RemovalSettings(damping=damping, swaps=0)
        settings = settings or StreamSettings()
        share = settings.activation_budget // (len(every) + 1)
        self._stream = Stream(source, validation, replace(settings, held_back=0, activation_budget=share), stages)
        # It uses the layers that the other stream makes resident.
        with eager_experts(source.model):
            self._stream.capture()
        self._variants = Variants[_Variant](self._stream, _FIX)

    def see(self, layer: ResidentLayer) -> None:
        """Measure the structures of a dense layer, and carry all variants through it; the layer does not advance.

        Raises:
            NumericsError: a value is not finite, or no damping makes a Hessian positive definite; names the matrix.
            ModelError: layers pass more than hidden states to one another, so variants would not be separate.
        """
        shadow = ResidentLayer(self._stream, layer.index)
        assert shadow.module is layer.module, "the survey is of the dense model"
        self._variants.advance(shadow)
        if own := self._open[layer.index]:
            needs = {matrix.name: Gram for offer in own for matrix in _consumers(layer, offer)}
            groups = {name: group for group in layer.observe(needs) for name in group.names}
            for offer in own:
                self._begin(shadow, offer, groups)
        shadow.advance()

    def result(self, watch: Callable[[int, int], None] = lambda done, total: None) -> BudgetPlan:
        """Measure the KL divergences and choose the levels, once the stream has ended.

        Args:
            watch: called with the number of positions compared and their total.

        Raises:
            NumericsError: a divergence is not finite; names the structure.
        """
        # All positions count, including the last: the validation sequences are few.
        divergences = self._variants.divergences(self._stream.hidden, last_position=True, watch=watch)
        assert len(divergences) == sum(map(len, self._open)), "the survey has not seen all layers"
        measured = [
            Measured(variant.layer, variant.offer, variant.curve, variant.reference, divergence)
            for variant, divergence in divergences.items()
        ]
        return choose_widths(measured, self._budget)

    def _begin(self, shadow: ResidentLayer, offer: Offer, groups: Mapping[str, Group]) -> None:
        """Solve for one structure, and start the hidden states of the model with only this structure pruned."""
        with torch.no_grad(), self._stream.stages("solve"):
            curve = self._curve(shadow, offer, groups)
            later = range(offer.reference, len(curve))
            reference = next((level for level in later if curve[level] > _LEAST_LOSS), offer.reference)
            weights = {
                matrix.name: self._solve(shadow, offer, matrix, groups, offer.levels[reference]).weight
                for matrix in _consumers(shadow, offer)
            }
        with with_weights(shadow, weights):
            self._variants.begin(_Variant(shadow.index, offer, curve, reference), shadow)

    def _curve(self, shadow: ResidentLayer, offer: Offer, groups: Mapping[str, Group]) -> tuple[float, ...]:
        """The relative output error at each level; for experts, of all together, each losing as many groups."""
        lost, total = torch.zeros(offer.levels[-1] + 1, dtype=torch.float64), 0.0
        for matrix in _consumers(shadow, offer):
            energy = loss(shadow.weight(matrix.name), _gram(groups[matrix.name]))
            lost += energy * self._solve(shadow, offer, matrix, groups, offer.levels[-1]).curve
            total += energy
        return tuple(float(lost[level]) / total if total > 0 else 0.0 for level in offer.levels)

    def _solve(
        self, shadow: ResidentLayer, offer: Offer, matrix: Matrix, groups: Mapping[str, Group], remove: int
    ) -> GroupRemoval:
        weight, gram = shadow.weight(matrix.name), _gram(groups[matrix.name])
        try:
            return remove_groups(weight, gram, offer.structure.columns, remove, self._removal)
        except NumericsError as error:
            raise error.at(matrix.name) from error


def _gram(group: Group) -> Tensor:
    assert isinstance(group.statistics, Gram)
    return group.statistics.products


def _consumers(layer: ResidentLayer, offer: Offer) -> list[Matrix]:
    """The matrices that read a structure: one, or one per expert."""
    return [matrix for matrix in layer.matrices.values() if matrix.parameter == offer.structure.consumer]
