"""The matmuls of a run, counted from shapes, for one layer of each kind.

forward   2 x elements x tokens for each matrix of a layer, in two forward passes: to observe the layer, to advance.
          With `statistics.sequential` it is observed once for each input, each time as far as the last matrix that
          reads it
Gram      2 x tokens x d^2 for each group of width d; as much again for tokens weighed by the loss; twice all that
          with corrected targets, for which the dense layer is observed and advanced, too
solve     as the methods state (`Method.work`, `Method.shared_work`): for SparseGPT d^3 / 3 for each group's
          factorisation, and 2 x out x d^2 for each matrix
matching  if layers are fitted as a whole: 6 x elements x training tokens for each epoch, 2 x elements x validation
          tokens for each and once before, and one more forward pass of the dense layer; of attentions that are
          fitted first as much again, and 2 x elements x validation tokens for the whole layer before
"""

from collections.abc import Collection, Mapping, Sequence

from llmprune.methods.correction import correction_work
from llmprune.pruning.fitting import repeated_share
from llmprune.pruning.forecast.plan import Work
from llmprune.pruning.jobs import Job
from llmprune.pruning.solving import turns
from llmprune.recipe.recipe import Recipe
from llmprune.statistics import Gram
from llmprune.stream.observation import Group
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.find.subblocks import SubBlocks
from llmprune.structures.plan import kept_share, observations, removal_work, replacing_work
from llmprune.structures.reduction import Reduction


class WorkCounter:
    """Counts what is done to a layer.

    Args:
        recipe: with the lengths of its texts resolved.
        reduction: what is removed from layers; None: nothing.
        parts: of each layer, if its attention is fitted before the rest.
        batch_tokens: tokens of the largest batch.

    Attributes:
        backward: passes over the layers before the first one is pruned.
    """

    def __init__(
        self, recipe: Recipe, reduction: Reduction | None, parts: Sequence[SubBlocks] | None, batch_tokens: int
    ) -> None:
        self._recipe, self._reduction, self._parts, self._batch_tokens = recipe, reduction, parts, batch_tokens
        length = recipe.calibration.tokens
        self._counted, self._validation = recipe.calibration.sequences * length, recipe.held_back * length
        self._tokens = self._counted + self._validation
        self.backward = 0

    def count(
        self,
        layer: ResidentLayer,
        groups: Sequence[Group],
        jobs: Mapping[str, Job],
        left: Mapping[str, tuple[int, int]],
        shares: Mapping[str, float],
    ) -> Work:
        """The operations for one layer.

        Args:
            layer: before anything is removed from it.
            groups: its matrices that are pruned, by their inputs.
            jobs: what is done to them.
            left: matrix -> (out, in) after structures are removed.
            shares: the fraction of the tokens that each matrix receives.
        """
        # Statistics once more, of the layer as it has been fitted.
        late = any(job.quantiser is not None and job.late for job in jobs.values())
        products, factors, solving = self._solving(layer, groups, jobs, left, shares, late)
        elements = {name: shares[name] * rows * columns for name, (rows, columns) in left.items()}
        whole = sum(elements.values())
        options = self._recipe.reconstruct
        # Corrected targets take the dense layer's outputs, unless block matching has them.
        compared = self._recipe.statistics.alpha > 0 and (options is None or options.target == "local")
        forward = (1 + late + self.backward + compared) * whole
        observed = self._observed(layer, groups, elements) if jobs else 0.0
        if self._reduction is not None:
            dense = sum(shares[name] * m.shape[0] * m.shape[1] for name, m in layer.matrices.items())
            forward += observations(self._reduction.found, layer.index) * dense
            gram, solve = removal_work(self._reduction.found, layer.index, self._counted)
            products, factors = products + gram, factors + solve
            passes, gram, solve = replacing_work(self._reduction.found, self._tokens, self._counted)
            forward, products, factors = forward + passes * dense, products + gram, factors + solve
        matching = self._matching(layer, jobs, shares, whole)
        return Work(2 * (forward * self._tokens + observed), products, factors + solving, matching)

    def _solving(
        self,
        layer: ResidentLayer,
        groups: Sequence[Group],
        jobs: Mapping[str, Job],
        left: Mapping[str, tuple[int, int]],
        shares: Mapping[str, float],
        late: bool,
    ) -> tuple[float, float, float]:
        """Operations of products, of factorisations and of all else that solvers do."""
        products = factors = 0.0
        solving = sum(job.work(left[name]) for name, job in jobs.items())
        for group in groups:
            width = left[group.names[0]][1]
            if isinstance(group.statistics, Gram):
                corrected, weighted = self._extended(layer, group)
                sums = (1 + weighted) * (1 + corrected) + late
                products += sums * 2 * self._counted * shares[group.names[0]] * width**2
                solving += corrected * sum(correction_work(left[name]) for name in group.names)
            # Matrices with one input share its factorisation; the most expensive one is counted.
            factors += max(jobs[name].shared_work(width) for name in group.names)
        return products, factors * (1 + late), solving

    def _extended(self, layer: ResidentLayer, group: Group) -> tuple[bool, bool]:
        """Whether the inputs of a group are compared with the dense model's; whether tokens are weighed by the loss."""
        options, routed = self._recipe.statistics, layer.matrices[group.names[0]].routed
        return options.alpha > 0 and not routed, options.loss_weight != "none" and not routed

    def _observed(self, layer: ResidentLayer, groups: Sequence[Group], elements: Mapping[str, float]) -> float:
        """Elements times tokens of the passes in which statistics are collected."""
        passed = self._passes(layer, groups, elements, self._tokens)
        if self._recipe.statistics.sequential:
            # One batch shows which turns there are.
            passed += min(self._batch_tokens, self._tokens) * sum(elements.values())
        if self._recipe.statistics.alpha:
            # The dense layer has no held-back rows to give.
            compared = [group for group in groups if not layer.matrices[group.names[0]].routed]
            passed += self._passes(layer, compared, elements, self._counted) if compared else 0.0
        return passed

    def _passes(
        self, layer: ResidentLayer, groups: Sequence[Group], elements: Mapping[str, float], tokens: int
    ) -> float:
        """Elements times tokens of the passes that show some inputs: one, or in turn one for each, which ends there."""
        whole = sum(elements.values())
        if not self._recipe.statistics.sequential:
            return whole * tokens
        # Where a pass may end is known once the first batch has run through all of the layer.
        first, order, passed = min(self._batch_tokens, tokens), list(layer.matrices), 0.0
        for names in turns(layer, groups):
            last = max(order.index(name) for name in names)
            passed += first * whole + (tokens - first) * sum(elements.get(name, 0.0) for name in order[:last])
        return passed

    def _matching(
        self, layer: ResidentLayer, jobs: Collection[str], shares: Mapping[str, float], elements: float
    ) -> float:
        """Operations of fitting the layer, with this many elements left for each token, in all epochs.

        Which layers are removed is not known yet: each counts for as much of itself as is kept on average.
        """
        options = self._recipe.reconstruct
        if options is None:
            return 0.0
        dense = sum(shares[name] * m.shape[0] * m.shape[1] for name, m in layer.matrices.items())
        parts = None if self._parts is None else self._parts[layer.index]
        again = 1 + repeated_share(layer, parts)
        followed = again * 2 * dense * self._tokens
        if not jobs and self._reduction is None:
            return followed
        once = 2 * elements * self._validation
        trained = 6 * elements * self._counted * options.epochs + once * (options.epochs + 1)
        kept = 1.0 if self._reduction is None else kept_share(self._reduction.found)
        return kept * (again * trained + once * (parts is not None)) + followed
