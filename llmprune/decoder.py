"""Find the decoder layers of a causal LM and the matrices in them that can be pruned, from structure alone.

No code here knows a model by name. What structure cannot tell stands in the tables at the top.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.errors import ModelError

# Matrices that choose a path rather than compute: small and decisive, so never pruned.
ROUTER_NAMES = ("gate", "router", "shared_expert_gate", "wg")

# Fused expert weights [experts, in, out] of classes that do not say so by `is_transposed`.
TRANSPOSED_EXPERTS = ("Llama4TextExperts",)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One prunable matrix.

    Attributes:
        name: dotted name in the model; a fused expert's number stands before the parameter's name
            ("model.layers.3.mlp.experts.7.down_proj").
        parameter: dotted name of the parameter that holds it, inside its decoder layer.
        expert: index along the first dimension of a fused expert tensor; None for an ordinary matrix.
        transposed: stored [in, out] (GPT-2's Conv1D) instead of [out, in].
        shape: (out, in).
    """

    name: str
    parameter: str
    expert: int | None
    transposed: bool
    shape: tuple[int, int]

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix as [out, in], a view of its parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.T if self.transposed else matrix


def find_decoder_layers(model: PreTrainedModel, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Locate the list of decoder layers: the outermost ModuleList that holds most of the parameters.

    Args:
        model: any causal LM; meta tensors suffice.
        path: dotted name of the list, where the search fails (recipe key `decoder_layers`).

    Raises:
        ModelError: nothing is there, or two lists are too close to call.
    """
    if path is not None:
        return path, _named_list(model, path)
    sizes = {name: (_parameters(module), module) for name, module in _outermost_lists(model)}
    ranked = sorted(sizes, key=lambda name: -sizes[name][0])
    ranked = [name for name in ranked if any(True for layer in sizes[name][1] for _ in prunable_matrices(layer, ""))]
    looked = ", ".join(f"{name} ({len(sizes[name][1])} modules)" for name in ranked) or "no ModuleList with matrices"
    if not ranked or (len(ranked) > 1 and sizes[ranked[1]][0] > 0.5 * sizes[ranked[0]][0]):
        raise ModelError(
            f"the decoder layers of {type(model).__name__} cannot be told: found {looked}",
            expected="one outermost torch.nn.ModuleList that holds most of the parameters",
            fix="name it in the recipe, for example decoder_layers: model.layers",
        )
    return ranked[0], sizes[ranked[0]][1]


def prunable_matrices(layer: nn.Module, prefix: str) -> Iterator[Matrix]:
    """Yield the matrices of a decoder layer, in the order of its modules.

    These are the weights of Linear and Conv1D modules and the fused 3-D weights of experts; routers are left alone.
    """
    for module_name, module in layer.named_modules():
        if module_name.rpartition(".")[2] in ROUTER_NAMES:
            continue
        full = ".".join(part for part in (prefix, module_name) if part)
        if isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape
            shape = (columns, rows) if transposed else (rows, columns)
            yield Matrix(full, _join(module_name, "weight"), None, transposed, shape)
        else:
            yield from _expert_matrices(module, module_name, full)


def _expert_matrices(module: nn.Module, module_name: str, full: str) -> Iterator[Matrix]:
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
    for name, parameter in module.named_parameters(recurse=False):
        if convolution or parameter.dim() != 3 or min(parameter.shape[1:]) == 1 or "bias" in name:
            continue
        transposed = getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED_EXPERTS)
        experts, rows, columns = parameter.shape
        shape = (columns, rows) if transposed else (rows, columns)
        for expert in range(experts):
            yield Matrix(f"{full}.{expert}.{name}", _join(module_name, name), expert, transposed, shape)


def _named_list(model: PreTrainedModel, path: str) -> nn.ModuleList:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.ModuleList) or not len(module):
        lists = ", ".join(name for name, _ in _outermost_lists(model)) or "none"
        raise ModelError(
            f"decoder_layers: {path!r} is no list of modules in {type(model).__name__}",
            expected=f"one of its ModuleLists: {lists}",
        )
    return module


def _outermost_lists(model: PreTrainedModel) -> Iterator[tuple[str, nn.ModuleList]]:
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in found):
            found.append(name)
            yield name, module


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _join(module_name: str, parameter: str) -> str:
    return f"{module_name}.{parameter}" if module_name else parameter
