"""Measure what each level of each structure costs the model, in one pass over the dense one.

The greedy search of `structures.solver` gives each structure the error curve of its consumer's output: one removal
after the other, everything else refitted. Then the structure alone is pruned to a reference level, and the hidden
states that follow are carried through all later layers beside the dense ones; at the end the divergence of the logits
is taken. Each structure has hidden states of its own on the validation samples, so that a pass costs about
structures * layers / 2 forwards of a layer over them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llmprune.errors import ModelError, NumericsError, PatternError
from llmprune.models.decoder import Matrix
from llmprune.models.source import Source, eager_experts
from llmprune.statistics import Gram
from llmprune.stream.activations import HiddenStates
from llmprune.stream.observation import Group
from llmprune.stream.stream import ResidentLayer, Stream, StreamSettings
from llmprune.structures.choose.budget import BudgetPlan, Candidate, Measured, allowed_size, choose_widths
from llmprune.structures.remove.block_matrices import loss
from llmprune.structures.remove.problem import Removal, RemovalSettings
from llmprune.structures.remove.solver import remove_groups
from llmprune.timing import Stages

# A level that loses a smaller part of the output than this changes the logits by little more than rounding does.
_LEAST_LOSS = 1e-4
# Sets of logits in memory at once beside the dense ones, and positions widened to float32 at once.
_SETS, _POSITIONS = 3, 512


@dataclass(frozen=True, slots=True, eq=False)
class _Variant:
    """The model in which one structure is pruned to its reference level."""

    layer: int
    candidate: Candidate
    curve: tuple[float, ...]
    reference: int
    states: HiddenStates


class BudgetSurvey:
    """Measures, in one pass over the dense model, what each level of each structure costs.

        survey = BudgetSurvey(source, candidates, removed, validation_ids, settings)
        for layer in Stream(source, ids, settings):
            survey.see(layer)
        plan = survey.result()

    Args:
        source: the dense model, the one that streams.
        candidates: for each decoder layer the structures that share the budget.
        remove: what must go of them, in the unit of their sizes, > 0.
        validation: tokens [samples, length] that the statistics do not see, for the divergences.
        settings: device, batch size and the memory that the hidden states of all variants share.
        damping: of the Gram, as for `RemovalSettings`.
        stages: stopwatch; a new one by default.

    Raises:
        PatternError: as much cannot go, no candidate can lose groups, or there is not one list a layer.
        ModelError: the model hands its layers something that they write to, or cannot be streamed.
    """

    def __init__(
        self,
        source: Source,
        candidates: Sequence[Sequence[Candidate]],
        remove: float,
        validation: Tensor,
        settings: StreamSettings | None = None,
        damping: float = 0.01,
        stages: Stages | None = None,
    ) -> None:
        self._open = [[candidate for candidate in own if len(candidate.levels) > 1] for own in candidates]
        every = [candidate for own in self._open for candidate in own]
        if len(candidates) != len(source.layers) or not every:
            raise PatternError(
                f"{len(every)} structures that can lose groups, in {len(candidates)} of {len(source.layers)} layers",
                expected="a list for each layer, and at least one such structure",
                fix="lower the multiple, or raise most",
            )
        self._budget = allowed_size(every, remove)
        self._removal = RemovalSettings(damping=damping, swaps=0)
        settings = settings or StreamSettings()
        share = settings.activation_budget // (len(every) + 1)
        self._stream = Stream(source, validation, replace(settings, held_back=0, activation_budget=share), stages)
        # Its layers are those that the other stream makes resident.
        with eager_experts(source.model):
            self._stream.capture()
        self._beside = [self._handed(index) for index in range(len(source.layers))]
        self._variants: list[_Variant] = []

    def see(self, layer: ResidentLayer) -> None:
        """Measure the structures of a dense layer, and carry all variants through it; the layer does not advance.

        Raises:
            NumericsError: a value is not finite, or no damping makes a Gram positive definite; names the matrix.
            ModelError: layers hand each other more than hidden states, so that variants would not be separate.
        """
        shadow = ResidentLayer(self._stream, layer.index)
        assert shadow.module is layer.module, "the survey is of the dense model"
        self._require_separate(shadow)
        for variant in self._variants:
            shadow.advance(variant.states)
        if own := self._open[layer.index]:
            needs = {matrix.name: Gram for candidate in own for matrix in _consumers(layer, candidate)}
            groups = {name: group for group in layer.observe(needs) for name in group.names}
            self._variants += [self._variant(shadow, candidate, groups) for candidate in own]
        shadow.advance()

    def result(self) -> BudgetPlan:
        """Take the divergences and choose the levels, once the stream has ended.

        Raises:
            NumericsError: a divergence is not finite; names the structure.
        """
        assert len(self._variants) == sum(map(len, self._open)), "the survey has not seen all layers"
        measured = [
            Measured(variant.layer, variant.candidate, variant.curve, variant.reference, divergence)
            for variant, divergence in zip(self._variants, self._divergences(), strict=True)
        ]
        return choose_widths(measured, self._budget)

    def _variant(self, shadow: ResidentLayer, candidate: Candidate, groups: Mapping[str, Group]) -> _Variant:
        """Solve for one structure, and start the hidden states of the model in which it alone is pruned."""
        with torch.no_grad(), self._stream.stages("solve"):
            curve = self._curve(shadow, candidate, groups)
            later = range(candidate.reference, len(curve))
            reference = next((level for level in later if curve[level] > _LEAST_LOSS), candidate.reference)
            weights = {
                matrix.name: self._solve(shadow, candidate, matrix, groups, candidate.levels[reference]).weight
                for matrix in _consumers(shadow, candidate)
            }
        states = self._stream.hidden.copy()
        with _in_place(shadow, weights):
            shadow.advance(states)
        return _Variant(shadow.index, candidate, curve, reference, states)

    def _curve(self, shadow: ResidentLayer, candidate: Candidate, groups: Mapping[str, Group]) -> tuple[float, ...]:
        """The relative error of the output at each level; of all experts together, each without as many groups."""
        lost, total = torch.zeros(candidate.levels[-1] + 1, dtype=torch.float64), 0.0
        for matrix in _consumers(shadow, candidate):
            energy = loss(shadow.weight(matrix.name), _gram(groups[matrix.name]))
            lost += energy * self._solve(shadow, candidate, matrix, groups, candidate.levels[-1]).curve
            total += energy
        return tuple(float(lost[level]) / total if total > 0 else 0.0 for level in candidate.levels)

    def _solve(
        self, shadow: ResidentLayer, candidate: Candidate, matrix: Matrix, groups: Mapping[str, Group], remove: int
    ) -> Removal:
        weight, gram = shadow.weight(matrix.name), _gram(groups[matrix.name])
        try:
            return remove_groups(weight, gram, candidate.structure.columns, remove, self._removal)
        except NumericsError as error:
            raise NumericsError(f"{matrix.name}: {error.what}", expected=error.expected, fix=error.fix) from error

    def _divergences(self) -> list[float]:
        """Mean KL(dense || variant) over all positions, in nats."""
        totals: list[float] = []
        for start in range(0, len(self._variants), _SETS):
            states = [variant.states for variant in self._variants[start : start + _SETS]]
            sums = [0.0] * len(states)
            for logits in self._stream.logits(self._stream.hidden, *states):
                sums = [known + more for known, more in zip(sums, _divergence(logits), strict=True)]
            totals += sums
        positions = sum(batch.numel() for batch in self._stream.batches)
        return [total / positions for total in totals]

    def _handed(self, index: int) -> list[Tensor]:
        """What a layer is handed in the first batch beside the hidden states."""
        leaves = tree_leaves(self._stream.calls.get(index, 0))
        for leaf in leaves:
            if isinstance(leaf, Mapping):
                raise _not_separate(f"{self._stream.source.layers_path}.{index} is handed a {type(leaf).__name__}")
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _require_separate(self, layer: ResidentLayer) -> None:
        """Refuse a layer that is handed anything that was not there before any layer ran."""
        before, now = self._beside[layer.index], self._handed(layer.index)
        if len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True)):
            raise _not_separate(f"{layer.name} is handed what a layer before it has computed")


def _gram(group: Group) -> Tensor:
    assert isinstance(group.statistics, Gram)
    return group.statistics.products


def _consumers(layer: ResidentLayer, candidate: Candidate) -> list[Matrix]:
    """The matrices that read a structure: one, or one an expert."""
    return [matrix for matrix in layer.matrices.values() if matrix.parameter == candidate.structure.consumer]


@contextmanager
def _in_place(layer: ResidentLayer, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a resident layer have other weights for a while."""
    names = {layer.matrices[name].parameter for name in weights}
    before = {name: layer.module.get_parameter(name).detach().clone() for name in names}
    try:
        for name, weight in weights.items():
            layer.replace(name, weight)
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                layer.module.get_parameter(name).copy_(values)


def _divergence(logits: Sequence[Tensor]) -> list[float]:
    """Sum over positions of KL(first || other) for each of the others, from log-softmax in float32."""
    first, *others = (part.flatten(0, -2).split(_POSITIONS) for part in logits)
    sums = [0.0] * len(others)
    for place, part in enumerate(first):
        before = part.float().log_softmax(-1)
        for which, other in enumerate(others):
            after = other[place].float().log_softmax(-1)
            sums[which] += float(F.kl_div(after, before, reduction="sum", log_target=True))
    return sums


def _not_separate(what: str) -> ModelError:
    return ModelError(
        what,
        expected="layers that hand each other hidden states only: variants of the model could not be kept apart",
        fix="remove the same fraction of every layer instead of spreading a budget",
    )
