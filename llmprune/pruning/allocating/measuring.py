"""The two passes of an allocation: statistics of the dense model, and divergences of pruned variants from it."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from llmprune.models.source import Source
from llmprune.progress import Progress
from llmprune.pruning.allocating.pool import Pool, masked
from llmprune.pruning.context import Run
from llmprune.statistics import ColumnNorm, Gram
from llmprune.stream.priors import add_priors
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream
from llmprune.stream.variants import Variants, with_weights

_FIX = "give the sparsities yourself with rules, which need no measurement"

# Validation sequences without enough held-back ones: an eighth of the text, and no more than this.
_MOST_ASIDE = 16

Name = TypeVar("Name", bound=Hashable)
Inputs = Mapping[str, ColumnNorm | Gram]
Visit = Callable[[ResidentLayer, Inputs], None]


def split(ids: Tensor, held_back: int) -> tuple[Tensor, Tensor]:
    """Split a text into tokens [samples, length] for statistics, and others for divergences.

    The held-back sequences are for divergences, and more if there are few.

    Args:
        ids: calibration tokens, held-back sequences last.
        held_back: how many.
    """
    count = aside(len(ids), held_back)
    return ids[: max(len(ids) - count, 1)], ids[-count:]


def aside(samples: int, held_back: int) -> int:
    """How many of the sequences are for divergences."""
    return max(held_back, min(_MOST_ASIDE, samples // 8), 1)


def collect(
    run: Run, source: Source, pool: Pool, ids: Tensor, need: type[ColumnNorm] | type[Gram], visit: Visit
) -> dict[str, ColumnNorm]:
    """Run the dense model over the calibration text, one layer at a time.

    Args:
        run: the context.
        source: the dense model.
        pool: the matrices.
        ids: tokens [samples, length], all of which count.
        need: what is collected about the inputs of each matrix.
        visit: told about each resident layer and its statistics, which are freed afterwards.

    Returns:
        Matrix -> the column norms of its inputs.

    Raises:
        NumericsError: an activation is not finite.
    """
    norms: dict[str, ColumnNorm] = {}
    stream = Stream(source, ids, replace(run.settings, held_back=0), run.stages)
    for layer in stream:
        run.watch(Progress("allocation, statistics", layer.index, pool.layers))
        names = [place.name for unit in pool.in_layer(layer.index) for place in pool.named(unit)]
        groups = layer.observe(dict.fromkeys(names, need), run.recipe.statistics.token_weight) if names else []
        add_priors(layer, groups, run.recipe.experts.min_tokens)
        inputs = {name: group.statistics for group in groups for name in group.names if group.statistics}
        with torch.no_grad(), run.stages("allocation"):
            visit(layer, inputs)
        # A Gram's diagonal is a view of it, and would keep all of it.
        norms |= {name: ColumnNorm(one.squares.clone(), one.tokens) for name, one in inputs.items()}
    run.watch(Progress("allocation, statistics", pool.layers, pool.layers))
    return norms


def diverge(
    run: Run,
    source: Source,
    ids: Tensor,
    variants: Mapping[Name, int],
    weights: Callable[[Name, ResidentLayer], Mapping[str, Tensor]],
    stage: str,
) -> dict[Name, float]:
    """Measure how far variants of the dense model are from it, all in one pass over its layers.

    Args:
        run: the context.
        source: the dense model; unchanged afterwards.
        ids: validation tokens [samples, length].
        variants: name -> the first layer in which the variant differs.
        weights: the matrices that differ in a resident layer; asked for the first and for every later one.
        stage: what progress calls the pass.

    Returns:
        Variant -> KL(dense || variant), in nats/token.

    Raises:
        ModelError: layers pass more than hidden states to one another.
        NumericsError: an output is not finite.
    """
    layers = len(source.layers)
    # The hidden states of all variants share the budget.
    share = run.settings.activation_budget // (len(variants) + 1)
    settings = replace(run.settings, held_back=0, outputs=True, activation_budget=share)
    stream = Stream(source, ids, settings, run.stages)
    together = Variants[Name](stream, _FIX)
    for layer in stream:
        run.watch(Progress(stage, layer.index, layers, f"{len(variants)} variants"))

        def changed(name: Name, layer: ResidentLayer = layer) -> AbstractContextManager[None]:
            with torch.no_grad(), run.stages("allocation"):
                return with_weights(layer, weights(name, layer))

        together.advance(layer, changed)
        for name, first in variants.items():
            if first == layer.index:
                with changed(name):
                    together.begin(name, layer)

    def watch_head(done: int, total: int) -> None:
        run.watch(Progress(f"{stage}, head", done, total, unit="position"))

    return together.divergences(stream.hidden, last_position=True, watch=watch_head)


def candidates(
    run: Run, source: Source, pool: Pool, ids: Tensor, norms: Mapping[str, ColumnNorm], stage: str
) -> Callable[[Sequence[Mapping[str, float]]], list[float]]:
    """A function that measures allocations by Wanda masks: sparsities of all matrices -> divergence, in nats/token.

    Args:
        run: the context.
        source: the dense model.
        pool: the matrices.
        ids: validation tokens [samples, length].
        norms: of every matrix of the pool, from `collect`.
        stage: what progress calls the passes; their number is added.
    """
    rounds = 0

    def measure(allocations: Sequence[Mapping[str, float]]) -> list[float]:
        nonlocal rounds
        rounds += 1

        def weights(number: int, layer: ResidentLayer) -> dict[str, Tensor]:
            own = [place for unit in pool.in_layer(layer.index) for place in pool.named(unit)]
            return {
                place.name: masked(layer, place, norms[place.name], allocations[number][place.name]) for place in own
            }

        found = diverge(
            run, source, ids, dict.fromkeys(range(len(allocations)), 0), weights, f"allocation, {stage} {rounds}"
        )
        return [found[number] for number in range(len(allocations))]

    return measure
