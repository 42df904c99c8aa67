"""Decide what to remove where the recipe alone does not, by measuring the dense model.

One pass over the calibration tokens covers hidden width, block influence, angular distance and the budget together.
Removal by measured KL divergence takes a pass per removed layer; gradients take one forward and one backward pass.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.models.sizes import COUNTS, Cost, layer_size
from llmprune.progress import Progress, Watcher
from llmprune.recipe.structures import BUDGETED, Budget, Groups
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.structures.choose.budget import Offer, allowed_size, offer
from llmprune.structures.choose.budget_survey import BudgetSurvey
from llmprune.structures.choose.depth_scores import (
    BlockInfluence,
    DepthRemoval,
    DepthUnit,
    LayerDistance,
    block_candidates,
    layer_candidates,
    remove_lowest,
    remove_run,
)
from llmprune.structures.choose.gradients import GradientMethod, gradient_scores
from llmprune.structures.choose.greedy import remove_greedily
from llmprune.structures.choose.scores import lowest_groups
from llmprune.structures.choose.width_survey import WidthSurvey
from llmprune.structures.decisions import Decisions, best_multiple, label
from llmprune.structures.describe.latency import Latency
from llmprune.structures.removable import Removable
from llmprune.timing import Stages

# Samples for measurements that cost many forwards each: KL divergences of single removals, and gradients.
_FEW, _GRADIENT_SAMPLES = 8, 32
_GRADIENTS: tuple[GradientMethod, ...] = ("fisher", "taylor")


def decide(removable: Removable, ids: Tensor, settings: StreamSettings, stages: Stages, watch: Watcher) -> Decisions:
    """Measure the dense model as far as the recipe requires, and decide.

    Args:
        removable: the recipe and the model.
        ids: calibration tokens [samples, length], validation sequences last.
        settings: of the streams.
        stages: stopwatch.
        watch: called with every step.

    Returns:
        The decisions, with the measurements behind them as evidence.

    Raises:
        LlmpruneError: this model does not support what the recipe asks for.
    """
    surveys = _Surveys(removable, ids, settings, stages, watch)
    surveys.stream()
    decisions = surveys.depth(removable.preview())
    decisions = surveys.blocks(decisions)
    decisions = surveys.width(decisions)
    decisions = surveys.budget(decisions)
    return surveys.gradients(decisions)


class _Surveys:
    """The surveys that one recipe needs, and the decisions that follow from them."""

    def __init__(
        self, removable: Removable, ids: Tensor, settings: StreamSettings, stages: Stages, watch: Watcher
    ) -> None:
        self._removable, self._spec, self._source = removable, removable.spec, removable.dense
        self._ids, self._settings, self._stages, self._watch = ids, settings, stages, watch
        self._layers = len(self._source.layers)
        self._depth: LayerDistance | None = None
        self._blocks: BlockInfluence | None = None
        self._width: WidthSurvey | None = None
        self._budget: BudgetSurvey | None = None

    def stream(self) -> None:
        """Run all surveys over the dense model in one pass."""
        spec, removable = self._spec, self._removable
        if spec.depth and spec.depth.method != "kl":
            span = spec.depth.count(self._layers) if spec.depth.method == "angular" else 1
            self._depth = LayerDistance(span)
        parts = [part for part, section in spec.blocks.items() if section.method != "kl"]
        if parts:
            self._blocks = BlockInfluence(removable.blocks, parts=parts)
        if spec.width and removable.width:
            self._width = WidthSurvey(removable.width, spec.width.method)
        ids = self._ids
        if spec.budget:
            ids, validation = self._split()
            self._budget = self._budget_survey(spec.budget, validation)
        finished = [survey for survey in (self._depth, self._blocks, self._width) if survey is not None]
        if not finished and self._budget is None:
            return
        stream = Stream(self._source, ids, replace(self._settings, outputs=True), self._stages)
        place = 0

        def tell(words: str = "") -> None:
            step = ", ".join(filter(None, ("measuring the dense model", words)))
            self._watch(Progress("survey", place, self._layers, step))

        tell("embeddings")
        stream.tell = tell
        for layer in stream:
            place = layer.index
            tell()
            for survey in (*finished, *([self._budget] if self._budget else ())):
                survey.see(layer)
        for survey in finished:
            survey.finish(stream)

    def depth(self, decisions: Decisions) -> Decisions:
        """Decide which layers to keep."""
        section = self._spec.depth
        if section is None:
            return decisions
        count = section.count(self._layers)
        first = bool(section.replace)  # nothing in front of the first layer could stand for it
        candidates = layer_candidates(self._layers, section.protect, first=first)
        if self._depth is None:
            removal = self._greedy(candidates, count)
        elif section.method == "angular":
            removal = remove_run(self._depth.angles, count, section.protect, first=first)
        else:
            removal = remove_lowest(self._depth.influence, candidates, count)
        kept = tuple(layer for layer in range(self._layers) if layer not in removal.layers)
        return replace(decisions, layers=kept, evidence={**decisions.evidence, "depth": removal.to_dict()})

    def blocks(self, decisions: Decisions) -> Decisions:
        """Decide which attention and MLP blocks to remove from the kept layers."""
        gone: dict[int, dict[str, int]] = {}
        evidence = dict(decisions.evidence)
        found = self._removable.blocks
        for part, section in self._spec.blocks.items():
            candidates = [c for c in block_candidates(found, [part]) if c.layer in decisions.layers]
            count = section.count(len(decisions.layers))
            if section.method == "kl" or self._blocks is None:
                removal = self._greedy(candidates, count)
            else:
                scores = self._blocks.result()
                removal = remove_lowest({c: scores[c] for c in candidates}, candidates, count)
            evidence[part] = removal.to_dict()
            for layer in removal.blocks:
                gone.setdefault(layer, {}).update(found[layer][part].modules)
        return replace(decisions, blocks=gone, evidence=evidence)

    def width(self, decisions: Decisions) -> Decisions:
        """Decide which hidden channels to keep."""
        if self._width is None:
            return decisions
        choice = self._width.result()
        evidence = {**decisions.evidence, "width": {"score": choice.score, "energy": choice.energy}}
        return replace(decisions, channels=tuple(choice.channels), factors=choice.factors, evidence=evidence)

    def budget(self, decisions: Decisions) -> Decisions:
        """Decide how many groups of each structure the budget removes."""
        if self._budget is None:
            return decisions
        plan = self._budget.result(self._watch_head)
        shared = {layer: dict(own) for layer, own in decisions.groups.items()}
        for layer, own in plan.groups.items():
            kinds = {
                structure.consumer: structure
                for structure, _ in self._removable.structures[layer]
                if structure.kind in BUDGETED
            }
            shared.setdefault(layer, {}).update({label(kinds[consumer]): count for consumer, count in own.items()})
        return replace(decisions, groups=shared, evidence={**decisions.evidence, "budget": plan.to_dict()})

    def gradients(self, decisions: Decisions) -> Decisions:
        """Decide which groups to remove where scores need gradients of the dense model's loss."""
        asked = {
            layer: [(s, section) for s, section in own if section.method in _GRADIENTS]
            for layer, own in enumerate(self._removable.structures)
        }
        named = {section.method for own in asked.values() for _, section in own}
        methods = [method for method in _GRADIENTS if method in named]
        if not methods:
            return decisions

        def watch(what: str, done: int, total: int) -> None:
            unit = "sample" if what == "head" else "layer"
            self._watch(Progress(f"gradients, {what}", done, total, unit=unit))

        structures = {layer: [structure for structure, _ in own] for layer, own in asked.items()}
        ids = self._ids[:_GRADIENT_SAMPLES]
        scores = gradient_scores(self._source, ids, self._settings, structures, methods, self._stages, watch)
        removed: dict[int, dict[str, tuple[tuple[int, ...], ...]]] = {}
        for layer, own in asked.items():
            for (structure, section), found in zip(own, scores.get(layer, ()), strict=True):
                count = decisions.groups[layer][label(structure)]
                partitions = structure.partitions
                lists = found[section.method].reshape(-1, structure.groups)
                removed.setdefault(layer, {})[label(structure)] = tuple(
                    tuple(lowest_groups(values, count, partitions).tolist()) for values in lists
                )
        return replace(decisions, removed=removed)

    def _greedy(self, candidates: Sequence[DepthUnit], count: int) -> DepthRemoval:
        def watch(passed: int, total: int) -> None:
            self._watch(Progress("survey", passed, total, "measuring removals"))

        blocks = () if candidates and candidates[0].part == "layer" else self._removable.blocks
        return remove_greedily(
            self._source, self._ids[:_FEW], self._settings, candidates, count, blocks, watch, self._watch_head
        )

    def _watch_head(self, done: int, total: int) -> None:
        self._watch(Progress("survey, head", done, total, unit="position"))

    def _split(self) -> tuple[Tensor, Tensor]:
        """Calibration tokens for the statistics, and those for KL divergences."""
        aside = max(self._settings.held_back, min(16, len(self._ids) // 8), 1)
        return self._ids[: len(self._ids) - aside + self._settings.held_back], self._ids[-aside:]

    def _budget_survey(self, budget: Budget, validation: Tensor) -> BudgetSurvey:
        cost = _cost(budget, self._settings.device, self._source.model.dtype)
        offers, remove = budget_problem(self._removable, budget, cost)
        sections = (section for own in self._removable.structures for _, section in own)
        damping = next(section.damping for section in sections if isinstance(section, Groups))
        return BudgetSurvey(
            self._source, offers, remove, validation, self._settings, damping=damping, stages=self._stages
        )


def check_budget(removable: Removable) -> None:
    """Refuse a budget that the structures cannot meet; latency can only be measured, so its budgets pass here.

    Raises:
        PatternError: the budget is too large; says how much can be removed at most.
    """
    budget = removable.spec.budget
    if budget is not None and budget.of in COUNTS:
        offers, remove = budget_problem(removable, budget, COUNTS[budget.of])
        allowed_size([offer for own in offers for offer in own], remove)


def budget_problem(removable: Removable, budget: Budget, cost: Cost) -> tuple[list[list[Offer]], float]:
    """The levels that each structure offers, layer by layer, and how much must be removed, in the unit of the cost."""
    layers = removable.dense.layers
    offers: list[list[Offer]] = [
        [
            offer(
                layers[layer],
                structure,
                cost,
                multiple=best_multiple(structure.groups, budget.multiple) if structure.kind == "ffn" else 1,
                most=budget.most,
                active=removable.active,
            )
            for structure, _ in own
            if structure.kind in BUDGETED
        ]
        for layer, own in enumerate(removable.structures)
    ]
    return offers, budget.remove * sum(layer_size(layer, cost, removable.active) for layer in layers)


def _cost(budget: Budget, device: torch.device, dtype: torch.dtype) -> Cost:
    if budget.of == "latency":
        return Latency(device, dtype, budget.tokens)
    return COUNTS[budget.of]
