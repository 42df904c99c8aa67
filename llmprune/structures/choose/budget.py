"""Choose the width of each layer from one budget for the whole model.

Each structure has a curve: the relative output error of its own consumer at each level of removal. Curves of different
layers are not comparable, so the KL divergence that one level causes in the whole model is measured
(`structures.choose.budget_survey`) and scales the curve:

    error(level) = curve(level) * KL(dense || pruned to the reference level) / curve(reference level)

`structures.choose.knapsack` then picks the levels with the smallest sum of errors. That errors add up is an
approximation: it ignores interactions between structures.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from torch import nn

from llmprune.errors import ModelError, NumericsError, PatternError
from llmprune.models.sizes import Cost
from llmprune.structures.choose.knapsack import LevelCurve, aligned_levels, allocate
from llmprune.structures.describe.latency import level_sizes
from llmprune.structures.find.discovery import Structure

# KL divergences below this, in nats, are rounding errors.
_LEAST_DIVERGENCE = 1e-7


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """The levels that one structure offers to the budget.

    Attributes:
        structure: of kind heads or ffn.
        levels: numbers of groups that may be removed, ascending from 0.
        sizes: cost of the structure at each level, in the budget's unit.
        reference: index of the level at which the KL divergence is measured.
    """

    structure: Structure
    levels: tuple[int, ...]
    sizes: tuple[float, ...]
    reference: int


def offer(
    layer: nn.Module,
    structure: Structure,
    cost: Cost,
    *,
    multiple: int = 1,
    most: float = 0.9,
    reference: float = 0.25,
    active: float = 1.0,
) -> Offer:
    """List the levels of one structure and their costs.

    Args:
        layer: its layer at full size; meta tensors suffice.
        structure: of kind heads or ffn, not refused.
        cost: the budget's unit: one of `sizes.COUNTS`, or a `Latency`.
        multiple: the number of kept groups is a multiple of this, >= 1.
        most: the largest fraction of the groups that may be removed, in [0, 1]; one group is always kept.
        reference: fraction of the groups removed when the KL divergence is measured; the nearest level is used.
        active: the fraction of the routed experts that a token reaches, in (0, 1].

    Raises:
        ModelError: the structure is refused, or is neither heads nor channels.
        PatternError: a number is out of range.
    """
    if structure.kind not in ("heads", "ffn") or structure.refusal is not None:
        raise ModelError(
            f"a budget cannot decide how much of {structure.consumer} to remove: "
            f"{structure.refusal or f'it is of kind {structure.kind}'}",
            expected="heads or FFN channels that can be removed",
        )
    if not (0 <= most <= 1 and 0 < reference < 1):
        raise PatternError(f"most is {most}, reference is {reference}", expected="fractions of the groups")
    limit = min(math.floor(most * structure.groups + 1e-9), structure.groups - 1)
    levels = aligned_levels(structure.groups, multiple, limit)
    sizes = tuple(level_sizes(layer, structure, levels, cost, active))
    wanted = reference * structure.groups
    nearest = min(range(1, len(levels)), key=lambda place: abs(levels[place] - wanted), default=0)
    return Offer(structure, levels, sizes, nearest)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What a survey measured for one structure.

    Attributes:
        layer: index of its decoder layer.
        offer: the structure's levels, more than one.
        curve: relative output error of the consumer at each level, starting from 0.
        reference: index of the level at which the KL divergence was measured, one with a positive error: otherwise it
            would say nothing about later levels.
        divergence: mean KL(dense || pruned to that level) per position, in nats.
    """

    layer: int
    offer: Offer
    curve: tuple[float, ...]
    reference: int
    divergence: float


@dataclass(frozen=True, slots=True)
class Share:
    """How much of one structure the budget removes, and why.

    Attributes:
        layer: index of the decoder layer.
        consumer: parameter inside it.
        kind: heads or ffn.
        groups: number of groups.
        removed: number of groups removed.
        uniform: number removed if all structures of a kind lost the same fraction; `removed` if that cannot meet the
            budget.
        levels: numbers of groups that could be removed.
        sizes: cost at each level, in the budget's unit.
        curve: relative output error of the consumer at each level.
        reference: the level at which the KL divergence was measured.
        divergence: mean KL(dense || pruned to that level) per position, in nats.
        error: predicted KL divergence at `removed`, in nats.
    """

    layer: int
    consumer: str
    kind: str
    groups: int
    removed: int
    uniform: int
    levels: tuple[int, ...]
    sizes: tuple[float, ...]
    curve: tuple[float, ...]
    reference: int
    divergence: float
    error: float


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """The widths of all layers under one budget; errors are predicted sums of KL divergences, in nats.

    Attributes:
        shares: one for each structure, in layer order.
        budget: allowed total cost of the structures, in the budget's unit.
        size: their actual total cost.
        error: the predicted error.
        bound: lower bound on the predicted error of any choice within the budget.
        uniform_error: predicted error of the best choice that removes the same fraction from all structures of a kind;
            None if none is within the budget.
        uniform_size: total cost of the structures for that choice.
        is_uniform: whether that choice was used because its predicted error is no worse.
    """

    shares: tuple[Share, ...]
    budget: float
    size: float
    error: float
    bound: float
    uniform_error: float | None
    uniform_size: float | None
    is_uniform: bool

    @property
    def groups(self) -> dict[int, dict[str, int]]:
        """Layer -> consumer -> number of groups removed; structures that lose none are omitted."""
        found: dict[int, dict[str, int]] = {}
        for share in self.shares:
            if share.removed:
                found.setdefault(share.layer, {})[share.consumer] = share.removed
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return asdict(self)


def allowed_size(offers: Sequence[Offer], remove: float) -> float:
    """The total cost allowed for the structures once the given amount is removed.

    Args:
        offers: the structures that share the budget.
        remove: how much to remove, in the unit of their sizes, > 0.

    Raises:
        PatternError: that much cannot be removed.
    """
    full = math.fsum(offer.sizes[0] for offer in offers)
    most = full - math.fsum(min(offer.sizes) for offer in offers)
    if not 0 < remove <= most * (1 + 1e-12):
        raise PatternError(
            f"the budget removes {remove / full:.1%} of the heads and channels, but at most {most / full:.1%} "
            "can be removed",
            expected="a share above 0 that can be removed from the structures",
            fix="lower the budget's remove, or allow more to be removed from each structure (most, multiple)",
        )
    return full - remove


def choose_widths(measured: Sequence[Measured], budget: float) -> BudgetPlan:
    """Choose a level for each structure so that the sum of predicted errors within the budget is minimal.

    Args:
        measured: the structures, each layer's consumers at most once.
        budget: their allowed total cost, in the unit of their sizes.

    Raises:
        NumericsError: a divergence is not finite; names the structure.
        PatternError: the budget cannot be met.
    """
    ladders = list(map(_ladder, measured))
    chosen = allocate(ladders, budget)
    levels = [chosen.levels[ladder.name] for ladder in ladders]
    uniform = _best_uniform(measured, ladders, budget)
    is_uniform = uniform is not None and _error(ladders, uniform) <= chosen.error
    if uniform is not None and is_uniform:
        levels = uniform
    others = levels if uniform is None else uniform
    return BudgetPlan(
        shares=tuple(map(_share, measured, ladders, levels, others)),
        budget=budget,
        size=_size(ladders, levels),
        error=_error(ladders, levels),
        bound=chosen.bound,
        uniform_error=None if uniform is None else _error(ladders, uniform),
        uniform_size=None if uniform is None else _size(ladders, uniform),
        is_uniform=is_uniform,
    )


def _ladder(measured: Measured) -> LevelCurve:
    """The levels as input to the knapsack, with errors in nats."""
    name = f"layer {measured.layer}, {measured.offer.structure.consumer}"
    if not math.isfinite(measured.divergence):
        raise NumericsError(
            f"{name}: the measured KL divergence is {measured.divergence}",
            expected="a finite number",
            fix="if activations overflow, set compute_dtype: float32",
        )
    error = measured.curve[measured.reference]
    # The survey picks a reference level with a positive error if there is one; otherwise no level loses anything.
    weight = max(measured.divergence, _LEAST_DIVERGENCE) / error if error > 0 else 0.0
    return LevelCurve(name, measured.curve, measured.offer.sizes, weight)


def _best_uniform(measured: Sequence[Measured], ladders: Sequence[LevelCurve], budget: float) -> list[int] | None:
    """The levels with the least error that remove the same fraction from all structures of a kind."""
    by_kind: dict[str, list[int]] = {}
    for place, one in enumerate(measured):
        by_kind.setdefault(one.offer.structure.kind, []).append(place)
    offers = []
    for places in by_kind.values():
        own = [ladders[place] for place in places]
        chosen = [[_level_at(measured[p].offer, part) for p in places] for part in _parts(measured, places)]
        offers.append([(_error(own, levels), _size(own, levels), levels) for levels in chosen])
    fitting = [
        (math.fsum(error for error, _, _ in combined), [levels for _, _, levels in combined])
        for combined in product(*offers)
        if math.fsum(size for _, size, _ in combined) <= budget * (1 + 1e-12)
    ]
    if not fitting:
        return None
    pairs = zip(by_kind.values(), min(fitting)[1], strict=True)
    found = {place: level for places, levels in pairs for place, level in zip(places, levels, strict=True)}
    return [found[place] for place in range(len(measured))]


def _parts(measured: Sequence[Measured], places: Sequence[int]) -> list[float]:
    """Every fraction of its groups that one of the structures can lose, ascending."""
    offered = [measured[place].offer for place in places]
    return sorted({level / offer.structure.groups for offer in offered for level in offer.levels})


def _level_at(offer: Offer, part: float) -> int:
    """Index of the last level that removes no more than this fraction."""
    return max(place for place, level in enumerate(offer.levels) if level / offer.structure.groups <= part + 1e-9)


def _error(ladders: Sequence[LevelCurve], levels: Sequence[int]) -> float:
    return math.fsum(ladder.errors[level] * ladder.weight for ladder, level in zip(ladders, levels, strict=True))


def _size(ladders: Sequence[LevelCurve], levels: Sequence[int]) -> float:
    return math.fsum(ladder.sizes[level] for ladder, level in zip(ladders, levels, strict=True))


def _share(measured: Measured, ladder: LevelCurve, level: int, uniform: int) -> Share:
    offer, structure = measured.offer, measured.offer.structure
    return Share(
        layer=measured.layer,
        consumer=structure.consumer,
        kind=structure.kind,
        groups=structure.groups,
        removed=offer.levels[level],
        uniform=offer.levels[uniform],
        levels=offer.levels,
        sizes=offer.sizes,
        curve=measured.curve,
        reference=offer.levels[measured.reference],
        divergence=measured.divergence,
        error=ladder.errors[level] * ladder.weight,
    )
