"""The sensitivity scan: the error and the KL divergence of each unit alone at several sparsities."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from llmprune.allocation.curves import DamageCurve, running_maximum
from llmprune.errors import CheckpointError, RecipeError
from llmprune.models.source import Source
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.allocating.measuring import Inputs, collect, diverge
from llmprune.pruning.allocating.pool import Pool, Unit, masked
from llmprune.pruning.context import Run
from llmprune.statistics import ColumnNorm, Gram
from llmprune.storage.records import read_as
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.remove.block_matrices import loss


@dataclass(frozen=True, slots=True)
class UnitScan:
    """The curves of one kind of matrix in one layer.

    Attributes:
        layer: number of the decoder layer.
        kind: name of the matrix inside the layer; of all experts with *.
        size: weights.
        levels: sparsities, ascending, in (0, 1).
        errors: relative output error with the unit's Wanda masks at each level, on the calibration text.
        divergences: KL(dense || with this unit alone pruned), in nats/token on held-back text; None: not measured.
    """

    layer: int
    kind: str
    size: int
    levels: tuple[float, ...]
    errors: tuple[float, ...]
    divergences: tuple[float | None, ...]

    def curve(self) -> DamageCurve:
        """The divergences, which between measured levels follow the errors; 0 at sparsity 0."""
        known = [place for place, value in enumerate(self.divergences) if value is not None]
        damage = []
        errors = running_maximum(self.errors)
        for place, error in enumerate(errors):
            nearest = min(known, key=lambda other: abs(other - place))
            reference = self.divergences[nearest]
            assert reference is not None
            # A KL divergence of rounding noise can be negative.
            damage.append(max(reference, 0.0) * (error / errors[nearest] if errors[nearest] > 0 else 1.0))
        return DamageCurve(self.size, (0.0, *self.levels), (0.0, *damage))


_WRITTEN, _AGAIN = "what llmprune sensitivity writes", "run it again"


class _Scanned(TypedDict):
    """The part of sensitivity.json that is read."""

    model: str
    source: str
    units: tuple[UnitScan, ...]


@dataclass(frozen=True, slots=True)
class Scan:
    """The curves of all units.

    Attributes:
        units: in the order of the layers.
        norms: column norms of the inputs of every matrix.
    """

    units: tuple[UnitScan, ...]
    norms: Mapping[str, ColumnNorm]


def scan(
    run: Run,
    source: Source,
    pool: Pool,
    texts: tuple[Tensor, Tensor],
    levels: Sequence[Sequence[float]],
    measured: Sequence[Sequence[float]],
) -> Scan:
    """Measure the curves: one pass for all errors, and one for each round of divergences.

    Args:
        run: the context.
        source: the dense model; unchanged afterwards.
        pool: the matrices.
        texts: tokens for statistics and for divergences, from `split`.
        levels: of each unit, ascending, in (0, 1).
        measured: rounds of divergences: each has one of its levels for every unit.

    Raises:
        ModelError: layers pass more than hidden states to one another.
        NumericsError: a value is not finite.
    """
    places = {(unit.layer, unit.kind): place for place, unit in enumerate(pool.units)}
    errors: dict[int, list[float]] = {}

    def visit(layer: ResidentLayer, inputs: Inputs) -> None:
        for unit in pool.in_layer(layer.index):
            place = places[unit.layer, unit.kind]
            errors[place] = _errors(layer, pool, unit, inputs, levels[place])

    norms = collect(run, source, pool, texts[0], Gram, visit)
    found: list[dict[float, float]] = [{} for _ in pool.units]
    for number, chosen in enumerate(measured, start=1):

        def weights(place: int, layer: ResidentLayer, chosen: Sequence[float] = chosen) -> dict[str, Tensor]:
            unit = pool.units[place]
            if unit.layer != layer.index:
                return {}
            return {one.name: masked(layer, one, norms[one.name], chosen[place]) for one in pool.named(unit)}

        starts = {place: unit.layer for place, unit in enumerate(pool.units)}
        stage = f"allocation, sensitivity {number} of {len(measured)}"
        for place, value in diverge(run, source, texts[1], starts, weights, stage).items():
            found[place][chosen[place]] = value
    units = tuple(
        UnitScan(
            unit.layer,
            unit.kind,
            unit.size,
            tuple(levels[place]),
            tuple(errors[place]),
            tuple(map(found[place].get, levels[place])),
        )
        for place, unit in enumerate(pool.units)
    )
    return Scan(units, norms)


def _errors(layer: ResidentLayer, pool: Pool, unit: Unit, inputs: Inputs, levels: Sequence[float]) -> list[float]:
    """The relative output error of a unit at each level; of experts, of all together."""
    lost, total = [0.0] * len(levels), 0.0
    for place in pool.named(unit):
        gram = inputs[place.name]
        assert isinstance(gram, Gram)
        norms, weight = ColumnNorm(gram.squares, gram.tokens), layer.weight(place.name)
        total += loss(weight, gram.products)
        for number, level in enumerate(levels):
            lost[number] += loss(weight - masked(layer, place, norms, level), gram.products)
    return [value / total if total > 0 else 0.0 for value in lost]


def to_dict(units: Sequence[UnitScan]) -> list[dict[str, Any]]:
    """The curves as plain data, ready for JSON; what is not finite is null."""
    return [
        {key: [_finite(v) for v in value] if isinstance(value, tuple) else value for key, value in asdict(unit).items()}
        for unit in units
    ]


def read_scan(
    file: Path, pool: Pool, digest: str | None = None, watch: Watcher = ignore, most: float = 1.0
) -> tuple[UnitScan, ...]:
    """Read the curves of `llmprune sensitivity`, for the units of a pool.

    Args:
        file: sensitivity.json.
        pool: the matrices.
        digest: of the checkpoint that is pruned; None: it is in memory.
        watch: told if the file is of a model with other weights, which may be meant: a fine-tuned one, for example.
        most: the highest sparsity of any matrix.

    Raises:
        RecipeError: there is no such file, it lacks a unit of this model, or its curves end before the target.
        CheckpointError: it is damaged.
    """
    if not file.is_file():
        raise RecipeError(
            f"allocation.sensitivity.file: no file {file}",
            expected="the sensitivity.json of llmprune sensitivity",
            fix="run it on this model, or leave out file to measure during the run",
        )
    scanned = read_as(file, _Scanned, expected=_WRITTEN, fix=_AGAIN)
    units = scanned["units"]
    if digest is not None and scanned["source"] != digest:
        watch(Progress(f"the curves in {file} are of other weights than these: of {scanned['model']}"))
    for unit in units:
        rising = all(low < high for low, high in zip((0.0, *unit.levels), (*unit.levels, 1.0), strict=True))
        if not unit.levels or not rising or {len(unit.errors), len(unit.divergences)} != {len(unit.levels)}:
            raise CheckpointError(
                f"{file} is damaged: the curve of {unit.kind} in layer {unit.layer}", expected=_WRITTEN, fix=_AGAIN
            )
    measured = [unit for unit in units if any(value is not None for value in unit.divergences)]
    known = {(unit.layer, unit.kind, unit.size): unit for unit in measured}
    missing = [u for u in pool.units if (u.layer, u.kind, u.size) not in known]
    if missing:
        raise RecipeError(
            f"{file} has no curve of {missing[0].kind} with {missing[0].size:,} weights in layer {missing[0].layer}",
            expected="curves of every matrix that the recipe prunes",
            fix="run llmprune sensitivity on this model, with the recipe's include and exclude",
        )
    found = tuple(known[unit.layer, unit.kind, unit.size] for unit in pool.units)
    reach = sum(unit.size * min(unit.levels[-1], most) for unit in found) / pool.size
    # Whole weights, rows or blocks are counted later.
    if reach < pool.sparsity - 1e-6:
        raise RecipeError(
            f"the curves in {file} reach {reach:.1%} zeros, and the pattern asks for {pool.sparsity:.1%}",
            expected="curves up to a sparsity above that of the pattern",
            fix=f"run llmprune sensitivity with --levels up to {_above(pool.sparsity):.2f}, or lower the pattern",
        )
    return found


def _above(sparsity: float) -> float:
    """A level halfway between a target and 1, rounded up to two digits."""
    return math.ceil(50 * (1 + sparsity)) / 100


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
