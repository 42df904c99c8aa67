"""Score the experts of a decoder layer by their outputs for the tokens routed to them.

A module of experts is called with the routing of tokens and its weights: it computes the weighted outputs of all
experts and sums them. Called for one expert at a time, with the tokens routed to it, it returns the terms of that sum.
So no code here depends on how an expert computes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import ModelError, PatternError
from llmprune.models.decoder import prunable_matrices
from llmprune.ranks import Ranks
from llmprune.statistics import check_finite
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.choose.scores import lowest_groups
from llmprune.structures.find.discovery import Structure

EXPERT_METHODS = ("reap", "output-norm", "output-energy", "frequency")

# The methods that measure outputs without the gates.
_GATE_FREE = ("output-norm", "output-energy")


@dataclass(frozen=True, slots=True, eq=False)
class ExpertScores:
    """Calibration results for the experts of one structure.

    Attributes:
        values: float64 [experts], on the CPU; the lowest are removed. An expert without tokens has 0.
        tokens: int64 [experts], on the CPU: number of tokens routed to each.
        chosen: number of experts per token; at least this many must be kept.
    """

    values: Tensor
    tokens: Tensor
    chosen: int


def expert_scores(layer: ResidentLayer, structures: Sequence[Structure], method: str) -> dict[str, ExpertScores]:
    """Score experts on the current hidden states of a layer.

    * reap: the mean over the tokens routed to an expert of gate * ||output|| (arXiv 2510.13999, equation 9). The gate
      is the one that the model applies: renormalised over the experts of a token where the model does so, as in the
      authors' code.
    * output-norm: the mean over these tokens of ||output||, without the gate.
    * output-energy: the mean over these tokens of ||output||^2, without the gate.
    * frequency: the number of tokens routed to it.

    Args:
        layer: resident, with all its experts; validation sequences do not count.
        structures: its structures of kind "experts" to score.
        method: one of `EXPERT_METHODS`.

    Returns:
        Consumer of a structure -> its experts' scores.

    Raises:
        PatternError: the method is unknown.
        ModelError: a structure is refused, or the layer's routing is not supported by the method.
        NumericsError: an expert's output is NaN or infinite.
    """
    if method not in EXPERT_METHODS:
        raise PatternError(f"experts cannot be scored by {method!r}", expected=" or ".join(EXPERT_METHODS))
    tallies = {structure.consumer: _Tally(layer, structure, method) for structure in structures}
    with torch.no_grad(), layer.stream.stages("forward"), contextlib.ExitStack() as hooks:
        for tally in tallies.values():
            hooks.enter_context(tally.module.register_forward_pre_hook(tally.see, with_kwargs=True))
        for batch in layer.stream.counted:
            hidden = layer.stream.hidden[batch]
            for tally in tallies.values():
                tally.positions = hidden.shape[:2].numel()
            layer.forward(hidden, batch)
    return {consumer: tally.scores(layer.stream.settings.ranks) for consumer, tally in tallies.items()}


def lowest_experts(scores: Mapping[str, ExpertScores], remove: int) -> dict[str, list[int]]:
    """Pick the experts with the lowest scores; on ties, the lower number is removed.

    Args:
        scores: consumer -> scores, for all expert structures of one layer; each loses the same number.
        remove: how many to remove from each.

    Returns:
        Consumer -> the experts to remove, ascending.

    Raises:
        PatternError: fewer experts would be kept than each token needs, or the structures have different numbers of
            experts.
    """
    counts = {len(own.values) for own in scores.values()}
    if len(counts) > 1:
        raise PatternError(
            f"the layer has structures of {sorted(counts)} experts: {', '.join(scores)}",
            expected="the same number of experts in each, since the config has one number for all",
        )
    for consumer, own in scores.items():
        if not 0 <= remove <= len(own.values) - own.chosen:
            raise PatternError(
                f"{remove} of the {len(own.values)} experts of {consumer} are to be removed, "
                f"but each token is routed to {own.chosen} of them",
                expected=f"at most {len(own.values) - own.chosen} removed",
            )
    return {consumer: lowest_groups(own.values, remove).tolist() for consumer, own in scores.items()}


class _Tally:
    """Counts tokens and sums output norms, expert by expert, whenever a module of experts is about to run.

    Attributes:
        module: the module that receives the routing.
        positions: number of tokens in the current batch.
    """

    def __init__(self, layer: ResidentLayer, structure: Structure, method: str) -> None:
        assert structure.kind == "experts", structure.kind
        if structure.refusal is not None:
            raise ModelError(
                f"the experts of {structure.consumer} cannot be removed: {structure.refusal}",
                fix="leave this structure out of the recipe",
            )
        self._structure, self._method = structure, method
        self.module = _experts_module(layer.module, structure)
        self.positions = 0
        self._seen = 0
        self._tokens = torch.zeros(structure.groups, dtype=torch.int64)
        self._norms = torch.zeros(structure.groups, dtype=torch.float64)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        self._seen += self.positions
        for expert, (tokens, outputs) in enumerate(self._terms(module, _Call(args, kwargs))):
            self._tokens[expert] += tokens
            if outputs is not None and tokens:
                norms = outputs.float().norm(dim=-1).double()
                norms = (norms.square() if self._method == "output-energy" else norms).sum()
                check_finite(norms, f"the output of expert {expert} of {self._structure.consumer}")
                self._norms[expert] += norms.cpu()

    def scores(self, ranks: Ranks) -> ExpertScores:
        """The scores after all batches, of all processes."""
        self._seen = sum(ranks.gather(self._seen))
        for sums in (self._tokens, self._norms):
            ranks.total(sums)
        if not self._seen:
            raise self._unknown(f"{type(self.module).__name__} is not called")
        values = self._tokens.double() if self._method == "frequency" else self._norms / self._tokens.clamp(min=1)
        return ExpertScores(values, self._tokens, -(-int(self._tokens.sum()) // self._seen))

    def _terms(self, module: nn.Module, call: "_Call") -> Iterator[tuple[int, Tensor | None]]:
        """For each expert, the number of its tokens and, if needed, their outputs [tokens, hidden].

        The outputs are weighted by the gates unless the method is gate-free.
        """
        experts, measured = self._structure.groups, self._method != "frequency"
        gated = self._method not in _GATE_FREE
        if (places := call.routing()) is not None:
            for expert in range(experts):
                rows, columns = (places == expert).nonzero(as_tuple=True)
                outputs = call.run(module, rows, columns, gated) if measured and len(rows) else None
                yield len(rows), outputs
        elif (inputs := call.lone_tensor()) is not None and len(inputs) == experts * self.positions:
            # Each expert has a row for every token, scaled by its gate, or zero if the token is not routed to it.
            if measured and not gated:
                raise self._unknown("the gates scale the experts' inputs, outside their module")
            sent = inputs.any(-1).view(experts, -1)
            terms = module.forward(inputs).view(experts, self.positions, -1) if measured else None
            for expert, own in enumerate(sent):
                yield int(own.sum()), None if terms is None else terms[expert][own]
        elif (sizes := call.sizes(experts)) is not None:
            if measured:
                raise self._unknown("the experts' outputs are weighted outside their module")
            yield from ((size, None) for size in sizes)
        else:
            raise self._unknown(f"{type(module).__name__} is called with unknown arguments")

    def _unknown(self, why: str) -> ModelError:
        return ModelError(
            f"the experts of {self._structure.consumer} cannot be scored by {self._method}: {why}",
            expected="a module of experts that is called with hidden states, the routing and its weights",
            fix=_FIXES[self._method],
        )


# Which method to try if one cannot be applied.
_FIXES = {
    "frequency": "leave this structure out of the recipe",
    "reap": "score experts by frequency",
    "output-norm": "score experts by reap or frequency",
    "output-energy": "score experts by reap or frequency",
}


class _Call:
    """The arguments of one call of a module of experts, recognised by shape: names and order differ."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs
        self._values = [value for value in (*args, *kwargs.values()) if value is not None]
        self._index: Tensor | None = None

    def routing(self) -> Tensor | None:
        """The experts of each token, [tokens, chosen], if there is one tensor of weights with the same shape."""
        tensors = [value for value in self._values if isinstance(value, Tensor)]
        for index in tensors:
            weights = [t for t in tensors if t.is_floating_point() and t.shape == index.shape]
            if index.dim() == 2 and not index.is_floating_point() and len(weights) == 1 and len(self._values) == 3:
                self._index = index
        return self._index

    def lone_tensor(self) -> Tensor | None:
        """The only argument, if it is a matrix."""
        value = self._values[0] if len(self._values) == 1 else None
        return value if isinstance(value, Tensor) and value.dim() == 2 else None

    def sizes(self, experts: int) -> list[int] | None:
        """How many rows belong to each expert, if the tokens are sorted by expert."""
        for value in self._values:
            if isinstance(value, list | tuple) and len(value) == experts and all(type(size) is int for size in value):
                return list(value)
        return None

    def run(self, module: nn.Module, rows: Tensor, columns: Tensor, gated: bool) -> Tensor:
        """Run one of the experts of each of these tokens: [tokens, hidden], weighted by its gate, or by 1."""
        index = self._index
        assert index is not None, "the routing is known"

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.shape != index.shape:
                return value.flatten(0, -2)[rows]
            own = value[rows, columns, None]
            return own if gated or not own.is_floating_point() else torch.ones_like(own)

        output = module.forward(*map(part, self._args), **{key: part(value) for key, value in self._kwargs.items()})
        return output.reshape(len(rows), -1)


def _experts_module(layer: nn.Module, structure: Structure) -> nn.Module:
    """The outermost module around the experts that excludes their router: it receives the routing."""
    fused = {matrix.parameter for matrix in prunable_matrices(layer, "") if matrix.expert is not None}
    modules = {name.rpartition(".")[0] for name in fused}
    routers = [part.name for part in structure.slices if part.name.rpartition(".")[0] not in modules]
    path = structure.consumer.rpartition(".")[0]
    while path:
        parent = path.rpartition(".")[0]
        if not parent or any(name.startswith(parent + ".") for name in routers):
            break
        path = parent
    return layer.get_submodule(path)
