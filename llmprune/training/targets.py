"""The matrices of a model that are pruned while it trains: those of its layers, in any model of transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from llmprune.errors import TrainingError
from llmprune.models.decoder import Matrix, outermost_lists, prunable_matrices
from llmprune.recipe.globs import matches_any
from llmprune.storage.files import listed
from llmprune.training.rules import Rule


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A matrix, and the parameter that holds it.

    Attributes:
        matrix: how it lies in the parameter.
        name: dotted name of the parameter in the model.
        parameter: that parameter.
    """

    matrix: Matrix
    name: str
    parameter: nn.Parameter

    def view(self, tensor: Tensor) -> Tensor:
        """The matrix as [out, in], a view of a tensor in the shape of the parameter."""
        return self.matrix.view(tensor)


def find_targets(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[Target]:
    """The matrices of all layers, as `llmprune prune` has them; embeddings, heads and routers are none.

    Args:
        model: with layers in a torch.nn.ModuleList: a causal LM, a classifier, an encoder.
        include: shell globs of the names of matrices.
        exclude: globs of included matrices that stay dense.

    Raises:
        TrainingError: there are none.
    """
    found = [
        target
        for target in _all_targets(model)
        if matches_any(include, target.matrix.name) and not matches_any(exclude, target.matrix.name)
    ]
    if not found:
        raise TrainingError(
            f"{type(model).__name__} has no matrices to prune",
            expected="layers in a torch.nn.ModuleList, with matrices that include covers and exclude does not",
            fix="change include and exclude",
        )
    return found


def require_trained(targets: Sequence[Target], rule: Rule) -> None:
    """Refuse frozen weights where gradients choose the masks: all would be chosen alike, by their places.

    Raises:
        TrainingError: names them.
    """
    frozen = [target.name for target in targets if not target.parameter.requires_grad]
    if frozen and (rule.score_rate or rule.watches):
        raise TrainingError(
            f"{type(rule).__name__} chooses by gradients, which {listed(frozen)} do not have",
            expected="matrices that train",
            fix="exclude those that are frozen, or choose the rule magnitude",
        )


def _all_targets(model: nn.Module) -> Iterator[Target]:
    for path, layers in outermost_lists(model):
        for index, layer in enumerate(layers):
            prefix = f"{path}.{index}"
            for matrix in prunable_matrices(layer, prefix):
                yield Target(matrix, f"{prefix}.{matrix.parameter}", layer.get_parameter(matrix.parameter))
