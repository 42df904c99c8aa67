"""What shares the zeros of an allocation: the matrices, and the units that are sparser or denser together."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llmprune.allocation.counts import Portion, distribute, portion
from llmprune.errors import RecipeError
from llmprune.methods import Wanda
from llmprune.models.decoder import prunable_matrices
from llmprune.models.source import Source
from llmprune.patterns import Block, Unstructured
from llmprune.pruning.jobs import Job
from llmprune.statistics import ColumnNorm
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.decisions import MatrixChoice

# The structure of a layer does not reveal which of its modules are attention; their names do.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """One matrix whose sparsity may change.

    Attributes:
        name: dotted name in the model.
        pattern: the recipe's.
        portion: the zeros that it can have.
    """

    name: str
    pattern: Unstructured | Block
    portion: Portion

    @property
    def sparsity(self) -> float:
        """Without an allocation."""
        return self.portion.uniform / self.portion.steps


@dataclass(frozen=True, slots=True)
class Unit:
    """The matrices of one kind in one layer: one, or that of each expert.

    Attributes:
        layer: number of the decoder layer.
        kind: name inside the layer, with the number of an expert replaced by *.
        attention: whether it belongs to the attention.
        places: indices into the pool's places.
        size: weights.
        sparsity: of all of them together, without an allocation.
    """

    layer: int
    kind: str
    attention: bool
    places: tuple[int, ...]
    size: int
    sparsity: float


@dataclass(frozen=True, slots=True)
class Pool:
    """All matrices that share the zeros.

    Attributes:
        places: the matrices, in the order of the layers.
        units: likewise.
        layers: decoder layers of the model.
    """

    places: tuple[Place, ...]
    units: tuple[Unit, ...]
    layers: int

    @property
    def size(self) -> int:
        """Weights of all matrices."""
        return sum(place.portion.size for place in self.places)

    @property
    def zeros(self) -> int:
        """Zeros of all matrices, with and without an allocation."""
        return sum(place.portion.zeros for place in self.places)

    @property
    def sparsity(self) -> float:
        """Of all matrices together."""
        return self.zeros / self.size

    def counted(self, offsets: Sequence[float]) -> dict[str, float]:
        """Exact sparsities of the matrices.

        Args:
            offsets: of each unit, how much sparser it should be than the recipe says.

        Raises:
            PatternError: the number of zeros cannot be met exactly.
        """
        desired = [0.0] * len(self.places)
        for unit, offset in zip(self.units, offsets, strict=True):
            for place in unit.places:
                desired[place] = self.places[place].sparsity + offset
        steps = distribute([place.portion for place in self.places], desired)
        return {p.name: count / p.portion.steps for p, count in zip(self.places, steps, strict=True)}

    def choices(self, sparsities: Mapping[str, float]) -> dict[str, MatrixChoice]:
        """The choices that make a run of these sparsities; matrices that keep the recipe's have none."""
        return {
            place.name: MatrixChoice(sparsity=sparsities[place.name])
            for place in self.places
            if sparsities[place.name] != place.sparsity
        }

    def in_layer(self, layer: int) -> list[Unit]:
        """The units of a decoder layer."""
        return [unit for unit in self.units if unit.layer == layer]

    def named(self, unit: Unit) -> list[Place]:
        """The matrices of a unit."""
        return [self.places[place] for place in unit.places]


def find_pool(source: Source, jobs: Sequence[Mapping[str, Job]]) -> Pool:
    """Find the matrices whose sparsity may change: those with an unstructured pattern or blocks, and some zeros.

    Args:
        source: the model.
        jobs: what the recipe does to the matrices of each layer.

    Raises:
        RecipeError: there are fewer than two.
    """
    places: list[Place] = []
    units: list[Unit] = []
    for index, (layer, own) in enumerate(zip(source.layers, jobs, strict=True)):
        path = f"{source.layers_path}.{index}"
        kinds: dict[str, list[int]] = {}
        for matrix in prunable_matrices(layer, path):
            job = own.get(matrix.name)
            if job is None or not isinstance(job.pattern, Unstructured | Block) or not 0 < job.pattern.sparsity < 1:
                continue
            kinds.setdefault((matrix.kind or matrix.name).removeprefix(f"{path}."), []).append(len(places))
            steps = portion(job.pattern.compared(job.method.scope), matrix.shape)
            places.append(Place(matrix.name, job.pattern, steps))
        units += [_unit(index, kind, found, places) for kind, found in kinds.items()]
    if len(places) < 2:
        raise RecipeError(
            f"an allocation over {len(places)} matrices",
            expected="at least two matrices with a sparsity above 0 and below 1, not N:M",
            fix="set allocation: uniform, set an unstructured pattern such as 0.5, or widen include",
        )
    return Pool(tuple(places), tuple(units), len(source.layers))


def masked(layer: ResidentLayer, place: Place, statistics: ColumnNorm, sparsity: float) -> Tensor:
    """A matrix of a resident layer [out, in] without its lowest Wanda scores, and no other change.

    Args:
        layer: the layer, dense.
        place: the matrix; its pattern decides what is compared, or else each row.
        statistics: of its inputs.
        sparsity: in [0, 1].
    """
    weight = layer.weight(place.name)
    scores = Wanda().scores(weight, statistics)
    return weight * replace(place.pattern, sparsity=sparsity).compared("row").mask(scores)


def _unit(layer: int, kind: str, found: Sequence[int], places: Sequence[Place]) -> Unit:
    size = sum(places[place].portion.size for place in found)
    zeros = sum(places[place].portion.zeros for place in found)
    return Unit(layer, kind, bool(_ATTENTION.search(kind)), tuple(found), size, zeros / size)
