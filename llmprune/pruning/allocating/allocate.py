"""The decision: an allocation becomes an exact sparsity for each matrix, and is compared with uniform."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.allocation.alpha import alpha
from llmprune.allocation.atp import atp, steepest
from llmprune.allocation.curves import choose_levels
from llmprune.allocation.dlp import dlp, mean_score
from llmprune.allocation.owl import outlier_share, owl
from llmprune.allocation.scalars import Evaluate, Position, search
from llmprune.allocation.switches import Evolution, evolve
from llmprune.measuring.perplexity import finite
from llmprune.methods import Wanda
from llmprune.models.source import Source
from llmprune.progress import Progress
from llmprune.pruning.allocating.globs import glob_offsets, require_matches
from llmprune.pruning.allocating.measuring import Inputs, candidates, collect, split
from llmprune.pruning.allocating.pool import Pool, find_pool
from llmprune.pruning.allocating.scan import UnitScan, read_scan, scan, to_dict
from llmprune.pruning.allocating.spectra import exponents
from llmprune.pruning.context import Run
from llmprune.pruning.jobs import Job
from llmprune.recipe.allocation import Allocation, Alpha, Atp, Dlp, Globs, Owl, Search, Sensitivity, Uniform
from llmprune.recipe.recipe import Recipe
from llmprune.statistics import ColumnNorm
from llmprune.storage.folders import expanded
from llmprune.storage.hub import checkpoint_digest
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.decisions import MatrixChoice

# Slopes that are tried without a given one, as parts of the distance between the first and the last layer's extremes.
_SLOPES = (-0.2, -0.1, 0.1, 0.2, 0.3)
# Levels of the error curves that a run measures itself.
_LEVELS = 12


@dataclass(frozen=True, slots=True)
class Allocated:
    """What was decided.

    Attributes:
        choices: matrix -> its sparsity, where it differs from the recipe's.
        record: the decision and what it is based on, ready for JSON: the header "allocation" of the report.
    """

    choices: Mapping[str, MatrixChoice]
    record: Mapping[str, Any]


@dataclass(slots=True)
class _Drawn:
    """Offsets of the units as a rule draws them, and what it measured."""

    offsets: Sequence[float]
    evidence: dict[str, Any] = field(default_factory=dict)
    # Of the allocation and of uniform, if the rule has measured them already.
    divergences: tuple[float, float] | None = None


def require_allocatable(recipe: Recipe, source: Source, jobs: Sequence[Mapping[str, Job]]) -> None:
    """Refuse an allocation that cannot be made, before any text is read.

    Args:
        recipe: whose allocation it is.
        source: the model, or what it looks like without the structures that are removed; its weights are not read.
        jobs: what the recipe does to the matrices of each layer.

    Raises:
        RecipeError: fewer than two matrices share the zeros, or a file or a glob does not fit the model.
        CheckpointError: a file is damaged.
    """
    allocation = recipe.allocation
    if isinstance(allocation, Uniform):
        return
    pool = find_pool(source, jobs)
    if isinstance(allocation, Globs):
        require_matches(pool, allocation.sparsities)
        # The sizes of a smaller model may be decided during the run.
        if recipe.structures is None:
            glob_offsets(pool, allocation.sparsities)
    if isinstance(allocation, Sensitivity) and allocation.file is not None:
        read_scan(expanded(allocation.file), pool, most=_most(allocation, pool))


def allocate(run: Run, source: Source, jobs: Sequence[Mapping[str, Job]], ids: Tensor) -> Allocated:
    """Decide how sparse each matrix becomes, and measure the decision beside uniform.

    Both are measured with Wanda masks on the held-back sequences, which no statistics contain.

    Args:
        run: its recipe has an allocation other than uniform.
        source: the dense model; unchanged afterwards.
        jobs: what the recipe does to the matrices of each layer.
        ids: calibration tokens [samples, length], held-back sequences last.

    Raises:
        RecipeError: fewer than two matrices share the zeros, or a file or a glob does not fit the model.
        PatternError: the number of zeros cannot be met exactly.
        ModelError: layers pass more than hidden states to one another.
        NumericsError: a value is not finite.
    """
    pool = find_pool(source, jobs)
    allocation, texts = run.recipe.allocation, split(ids, run.recipe.held_back)
    survey = _Survey(run, source, pool, texts)
    drawn = _RULES[type(allocation)](survey, allocation)
    sparsities = pool.counted(drawn.offsets)
    if drawn.divergences is None:
        survey.require_norms()
        measure = candidates(run, source, pool, texts[1], survey.norms, "beside uniform")
        ours, uniform = measure([sparsities, pool.counted([0.0] * len(pool.units))])
    else:
        ours, uniform = drawn.divergences
    record = _record(allocation, pool, sparsities, drawn.evidence)
    record |= {"divergence": finite(ours), "uniform_divergence": finite(uniform), "worse": not ours <= uniform}
    record["tokens"] = texts[1].numel()
    if record["worse"]:
        run.watch(Progress(warning(record)))
    return Allocated(pool.choices(sparsities), record)


def allocate_unmeasured(run: Run, source: Source, jobs: Sequence[Mapping[str, Job]]) -> Allocated:
    """Follow given sparsities for a model whose weights do not exist yet, so that nothing can be measured.

    Raises:
        RecipeError: a glob does not fit the model.
        PatternError: the number of zeros cannot be met exactly.
    """
    pool, allocation = find_pool(source, jobs), run.recipe.allocation
    assert isinstance(allocation, Globs)
    sparsities = pool.counted(glob_offsets(pool, allocation.sparsities))
    record = _record(allocation, pool, sparsities, {})
    unmeasured = {"divergence": None, "uniform_divergence": None, "worse": None, "tokens": 0}
    return Allocated(pool.choices(sparsities), record | unmeasured)


def warning(record: Mapping[str, Any]) -> str:
    """One sentence about an allocation that is worse than uniform; empty for any other, or if it was not measured."""
    if not record.get("worse"):
        return ""
    ours, uniform = (_shown(record[key]) for key in ("divergence", "uniform_divergence"))
    return (
        f"allocation {record['rule']} is worse than uniform on held-back text: KL divergence {ours} instead of "
        f"{uniform} nats/token with Wanda masks; consider allocation: uniform, or search"
    )


class _Survey:
    """What the rules may measure; column norms are collected once."""

    def __init__(self, run: Run, source: Source, pool: Pool, texts: tuple[Tensor, Tensor]) -> None:
        self.run, self.source, self.pool, self.texts = run, source, pool, texts
        self.norms: Mapping[str, ColumnNorm] = {}

    def require_norms(self) -> None:
        """Collect the column norms, if no pass has yet."""
        if not self.norms:
            self.each_layer(lambda layer, inputs: None)

    def each_layer(self, visit: Callable[[ResidentLayer, Inputs], None]) -> None:
        """One pass over the calibration text."""
        self.norms = collect(self.run, self.source, self.pool, self.texts[0], ColumnNorm, visit)

    def scores(self, of: Callable[[list[Tensor]], float]) -> dict[int, float]:
        """Decoder layer -> a number made of the Wanda scores of its matrices."""
        found: dict[int, float] = {}

        def visit(layer: ResidentLayer, inputs: Inputs) -> None:
            places = [place for unit in self.pool.in_layer(layer.index) for place in self.pool.named(unit)]
            if places:
                scores = [Wanda().scores(layer.weight(place.name), inputs[place.name]) for place in places]
                found[layer.index] = of(scores)

        self.each_layer(visit)
        return found

    def spread(self, of_layers: Mapping[int, float]) -> list[float]:
        """Sparsities of layers as offsets of their units."""
        return [of_layers[unit.layer] - self.pool.sparsity for unit in self.pool.units]

    def evaluate(self, stage: str) -> Evaluate:
        """Measure candidates given as offsets of the units."""
        self.require_norms()
        measure = candidates(self.run, self.source, self.pool, self.texts[1], self.norms, stage)
        return lambda offsets: measure([self.pool.counted(one) for one in offsets])


def _owl(survey: _Survey, rule: Any) -> _Drawn:
    found = survey.scores(lambda scores: outlier_share(scores, rule.multiple))
    return _by_layer(survey, found, owl(list(found.values()), survey.pool.sparsity, rule.spread), "share of outliers")


def _dlp(survey: _Survey, rule: Any) -> _Drawn:
    found = survey.scores(mean_score)
    return _by_layer(survey, found, dlp(list(found.values()), survey.pool.sparsity, rule.spread), "mean score")


def _alpha(survey: _Survey, rule: Any) -> _Drawn:
    found = exponents(survey.run, survey.source, survey.pool)
    sizes = [sum(unit.size for unit in survey.pool.in_layer(layer)) for layer in found]
    chosen = alpha(list(found.values()), sizes, survey.pool.sparsity, rule.spread)
    return _by_layer(survey, found, chosen, "tail exponent")


def _by_layer(survey: _Survey, found: Mapping[int, float], chosen: Sequence[float], what: str) -> _Drawn:
    layers = {what: {str(layer): value for layer, value in found.items()}}
    return _Drawn(survey.spread(dict(zip(found, chosen, strict=True))), layers)


def _atp(survey: _Survey, rule: Any) -> _Drawn:
    pool = survey.pool
    layers = list(dict.fromkeys(unit.layer for unit in pool.units))

    def offsets(slope: float) -> list[float]:
        return survey.spread(dict(zip(layers, atp(len(layers), pool.sparsity, slope), strict=True)))

    if rule.slope is not None:
        return _Drawn(offsets(rule.slope), {"slope": rule.slope})
    limit = steepest(len(layers), pool.sparsity)
    per_layer = [part / max(len(layers) - 1, 1) for part in _SLOPES]
    tried = [0.0, *dict.fromkeys(min(max(slope, -limit), limit) for slope in per_layer)]
    found = survey.evaluate("slopes")([offsets(slope) for slope in tried])
    best = min(range(len(tried)), key=lambda place: found[place])
    evidence = {
        "slope": tried[best],
        "tried": [[slope, finite(value)] for slope, value in zip(tried, found, strict=True)],
    }
    return _Drawn(offsets(tried[best]), evidence, (found[best], found[0]))


def _sensitivity(survey: _Survey, rule: Any) -> _Drawn:
    pool = survey.pool
    most = _most(rule, pool)
    if rule.file is not None:
        units: Sequence[UnitScan] = _read(survey, expanded(rule.file), most)
    else:
        levels = [
            sorted({unit.sparsity, *(most * step / _LEVELS for step in range(1, _LEVELS + 1))}) for unit in pool.units
        ]
        found = scan(survey.run, survey.source, pool, survey.texts, levels, [[unit.sparsity for unit in pool.units]])
        survey.norms, units = found.norms, found.units
    curves = {f"{unit.kind} of layer {unit.layer}": unit.curve() for unit in units}
    chosen = choose_levels(curves, pool.sparsity, rule.grid, most)
    offsets = [level - unit.sparsity for level, unit in zip(chosen.values(), pool.units, strict=True)]
    return _Drawn(offsets, {"units": to_dict(units)})


def _most(rule: Sensitivity, pool: Pool) -> float:
    """The highest sparsity of any matrix; at a target that is as high, nothing could be spread."""
    return rule.most if rule.most > pool.sparsity else (1 + pool.sparsity) / 2


def _read(survey: _Survey, file: Path, most: float) -> Sequence[UnitScan]:
    folder = survey.source.folder
    digest = None if folder is None else checkpoint_digest(folder)
    return read_scan(file, survey.pool, digest, survey.run.watch, most)


def _search(survey: _Survey, rule: Any) -> _Drawn:
    pool = survey.pool
    last = max(pool.layers - 1, 1)
    positions = [Position(unit.layer / last, unit.attention) for unit in pool.units]
    evaluate = survey.evaluate("search, round")
    # As distances from what the recipe says, which may differ between matrices.
    found = search(positions, 0.0, evaluate, rule.step)
    offsets, ours = found.sparsities, found.divergence
    evidence: dict[str, Any] = {"tried": [[list(scalars), finite(value)] for scalars, value in found.tried]}
    if rule.generations:
        own = [unit.sparsity for unit in pool.units]
        start = [min(max(base + offset, 0.0), 1.0) for base, offset in zip(own, offsets, strict=True)]
        evolution = Evolution(rule.generations, rule.offspring, seed=rule.seed)
        switches = survey.evaluate("switches, generation")

        def measured(levels: Sequence[Sequence[float]]) -> Sequence[float]:
            return switches([[level - base for level, base in zip(one, own, strict=True)] for one in levels])

        best, ours, course = evolve(start, ours, [unit.size for unit in pool.units], measured, evolution)
        offsets = tuple(level - base for level, base in zip(best, own, strict=True))
        evidence["generations"] = list(map(finite, course))
    return _Drawn(offsets, evidence, (ours, found.uniform))


def _globs(survey: _Survey, rule: Any) -> _Drawn:
    return _Drawn(glob_offsets(survey.pool, rule.sparsities))


_RULES: Mapping[type[Allocation], Callable[[_Survey, Any], _Drawn]] = {
    Owl: _owl, Alpha: _alpha, Dlp: _dlp, Atp: _atp, Sensitivity: _sensitivity, Search: _search, Globs: _globs,
}  # fmt: skip


def _record(
    allocation: Allocation, pool: Pool, sparsities: Mapping[str, float], evidence: Mapping[str, Any]
) -> dict[str, Any]:
    units = [
        {
            "layer": unit.layer,
            "kind": unit.kind,
            "size": unit.size,
            "sparsity": sum(sparsities[p.name] * p.portion.size for p in pool.named(unit)) / unit.size,
            "uniform": unit.sparsity,
        }
        for unit in pool.units
    ]
    return {"rule": allocation.name, "zeros": pool.zeros, "size": pool.size, "units": units, "evidence": dict(evidence)}


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
