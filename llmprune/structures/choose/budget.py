"""Choose how wide each layer stays, from one budget for the whole model.

What a structure loses at each level is known as an error curve of its own consumer's output, and curves of different
layers do not compare. So the divergence that one level costs the model is measured (`structures.budget_survey`), and
gives the curve its unit:

    error(level) = curve(level) * KL(dense || pruned to the reference level) / curve(reference level)

`structures.allocation` then picks the levels whose errors add up to least. That the errors add up is a prediction: it
leaves out what structures do to each other.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from torch import nn

from llmprune.errors import ModelError, NumericsError, PatternError
from llmprune.models.sizes import Cost
from llmprune.structures.choose.knapsack import Ladder, aligned_levels, allocate
from llmprune.structures.describe.latency import level_sizes
from llmprune.structures.find.discovery import Structure

# Divergences below this, in nats, are rounding.
_LEAST_DIVERGENCE = 1e-7


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """A structure whose width the budget decides.

    Attributes:
        structure: of kind heads or ffn.
        levels: numbers of groups that may go, ascending from 0.
        sizes: what the structure costs at each level, in the budget's unit.
        reference: index of the level at which its divergence is measured.
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
    """Offer the levels of one structure to the budget.

    Args:
        layer: its layer at full size; meta tensors suffice.
        structure: of kind heads or ffn, not refused.
        cost: the budget's unit (`structures.costs`).
        multiple: of what the number of groups that stay is a multiple, >= 1.
        most: the largest fraction of the groups that may go, in [0, 1]; one group stays in any case.
        reference: the fraction of the groups without which the divergence is measured; the nearest level is taken.
        active: the fraction of the routed experts that a token reaches, in (0, 1].

    Raises:
        ModelError: the structure is refused, or is none of heads or channels.
        PatternError: a number is out of range.
    """
    if structure.kind not in ("heads", "ffn") or structure.refusal is not None:
        raise ModelError(
            f"a budget cannot decide how much of {structure.consumer} goes: "
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
    """What a survey found out about an offer.

    Attributes:
        layer: index of its decoder layer.
        offer: it, with more than one level.
        curve: relative error of the consumer's output at each level, from 0.
        reference: index of the level at which the divergence was measured; at a level that loses nothing it would say
            nothing about later ones.
        divergence: the mean KL(dense || pruned there) of a position, in nats.
    """

    layer: int
    offer: Offer
    curve: tuple[float, ...]
    reference: int
    divergence: float


@dataclass(frozen=True, slots=True)
class Share:
    """What the budget leaves of one structure, and why.

    Attributes:
        layer: index of the decoder layer.
        consumer: parameter inside it.
        kind: heads or ffn.
        groups: that there are.
        removed: that go.
        uniform: that would go if all of a kind lost as much; `removed` where no such choice keeps the budget.
        levels: numbers of groups that could go.
        sizes: what each level costs, in the budget's unit.
        curve: relative error of the consumer's output at each level.
        reference: the level whose divergence was measured.
        divergence: the mean KL(dense || pruned there) of a position, in nats.
        error: the predicted divergence at `removed`, in nats.
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
    """The widths that one budget gives all layers; errors are predicted sums of divergences, in nats.

    Attributes:
        shares: one for each offer, in the order of the layers.
        budget: what the structures may cost together, in the budget's unit.
        size: what they will.
        error: predicted.
        bound: no choice of levels within the budget has a lower predicted error.
        uniform_error: predicted for the best choice that takes the same fraction of all structures of a kind; None
            where there is none within the budget.
        uniform_size: what the structures would cost then.
        is_uniform: whether that choice was taken, because its prediction is as good.
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
        """Layer -> consumer -> groups that go; only those of which some do."""
        found: dict[int, dict[str, int]] = {}
        for share in self.shares:
            if share.removed:
                found.setdefault(share.layer, {})[share.consumer] = share.removed
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return asdict(self)


def allowed_size(offers: Sequence[Offer], remove: float) -> float:
    """What the offers may cost together once so much of them has gone.

    Args:
        offers: the structures that share the budget.
        remove: what must go, in the unit of their sizes, > 0.

    Raises:
        PatternError: as much cannot go.
    """
    full = math.fsum(offer.sizes[0] for offer in offers)
    most = full - math.fsum(min(offer.sizes) for offer in offers)
    if not 0 < remove <= most * (1 + 1e-12):
        raise PatternError(
            f"the budget takes {remove / full:.1%} of the heads and channels, and {most / full:.1%} can go at most",
            expected="a share above 0 that the structures can lose",
            fix="lower the budget's remove, or let more of each structure go (most, multiple)",
        )
    return full - remove


def choose_widths(measured: Sequence[Measured], budget: float) -> BudgetPlan:
    """Choose a level for each structure so that the predicted errors add up to least within the budget.

    Args:
        measured: the structures, each layer's consumers at most once.
        budget: what they may cost together, in the unit of their sizes.

    Raises:
        NumericsError: a divergence is not finite; names the structure.
        PatternError: the budget cannot be kept.
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


def _ladder(measured: Measured) -> Ladder:
    """The levels as the allocation sees them, errors in nats."""
    name = f"layer {measured.layer}, {measured.offer.structure.consumer}"
    if not math.isfinite(measured.divergence):
        raise NumericsError(
            f"{name}: the divergence measured is {measured.divergence}",
            expected="a finite number",
            fix="set compute_dtype: float32 if activations overflow",
        )
    error = measured.curve[measured.reference]
    # A survey goes on to a level that loses something, so here nothing is lost at any of them.
    weight = max(measured.divergence, _LEAST_DIVERGENCE) / error if error > 0 else 0.0
    return Ladder(name, measured.curve, measured.offer.sizes, weight)


def _best_uniform(measured: Sequence[Measured], ladders: Sequence[Ladder], budget: float) -> list[int] | None:
    """The levels with the least error that take the same fraction of all structures of a kind."""
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
    """The last level that takes no more than this fraction."""
    return max(place for place, level in enumerate(offer.levels) if level / offer.structure.groups <= part + 1e-9)


def _error(ladders: Sequence[Ladder], levels: Sequence[int]) -> float:
    return math.fsum(ladder.errors[level] * ladder.weight for ladder, level in zip(ladders, levels, strict=True))


def _size(ladders: Sequence[Ladder], levels: Sequence[int]) -> float:
    return math.fsum(ladder.sizes[level] for ladder, level in zip(ladders, levels, strict=True))


def _share(measured: Measured, ladder: Ladder, level: int, uniform: int) -> Share:
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
