"""Find the decoder layers of a causal LM and the matrices in them that can be pruned, from structure alone.

No code here is specific to one model. What the structure does not reveal is listed in the tables at the top.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.errors import ModelError

# Modules that route tokens rather than compute: small but decisive, so nothing in them is ever pruned.
ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}

# Classes whose 3-D weights are [experts, in, out] although they do not set `is_transposed`.
TRANSPOSED_EXPERTS = {"Llama4TextExperts", "RecurrentGemmaRglru"}

# Matrices stacked along the first dimension of a 2-D parameter.
# class: (attribute with their number, parameters stored [out, in], parameters stored [in, out])
STACKED = {
    "DbrxExpertGLU": ("moe_num_experts", ("w1", "v1"), ("w2",)),
    "DeepseekV4GroupedLinear": ("n_groups", ("weight",), ()),
}


# The number of a routed expert in the name of its own module or matrix ("mlp.experts.7.up_proj").
EXPERT_NUMBER = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One prunable matrix.

    Attributes:
        name: dotted name in the model; a fused expert's number comes before the parameter's name
            ("model.layers.3.mlp.experts.7.down_proj").
        parameter: dotted name of the parameter that holds it, inside its decoder layer.
        expert: index among the matrices of a fused parameter; None for an ordinary matrix.
        transposed: stored [in, out] (GPT-2's Conv1D) instead of [out, in].
        shape: (out, in).
        experts: how many matrices the parameter holds.
        routed: whether a router decides which tokens it multiplies, i.e. whether it belongs to an expert. The blocks
            of a block-diagonal matrix share a parameter too, but see every token.
    """

    name: str
    parameter: str
    expert: int | None
    transposed: bool
    shape: tuple[int, int]
    experts: int = 1
    routed: bool = False

    @property
    def kind(self) -> str | None:
        """The name with the number of the expert or block replaced by *, the same for all of them; None for others."""
        if self.expert is not None:
            head, _, leaf = self.name.rpartition(f".{self.expert}.")
            return f"{head}.*.{leaf}"
        return EXPERT_NUMBER.sub("*", self.name) if EXPERT_NUMBER.search(self.name) else None

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix as [out, in], a view of its parameter."""
        if self.expert is None:
            matrix = parameter
        else:
            matrix = (parameter if parameter.dim() == 3 else parameter.unflatten(0, (self.experts, -1)))[self.expert]
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """A causal LM and its decoder layers: found once, when the model is built or opened, and passed on from there.

    Attributes:
        model: the whole model; meta tensors suffice.
        path: dotted name of the list of decoder layers.
        layers: that list. Its layers may be replaced.
    """

    model: PreTrainedModel
    path: str
    layers: nn.ModuleList

    @classmethod
    def find(cls, model: PreTrainedModel, path: str | None = None) -> "Decoder":
        """Locate the list of layers: the outermost ModuleList of the text decoder that holds most of its parameters.

        Args:
            model: any causal LM.
            path: dotted name of the list, if known, or where the search fails (recipe key `decoder_layers`).

        Raises:
            ModelError: no list is found, two lists are too close in size to choose, or layers share parameters.
        """
        if path is None:
            path = _largest_list(model)
        layers = _named_list(model, path)
        _require_separate(layers, path)
        return cls(model, path, layers)

    def layer_name(self, index: int) -> str:
        """Dotted name of a decoder layer."""
        return f"{self.path}.{index}"

    def place(self, name: str) -> tuple[int | None, str]:
        """Split a dotted name of the model into its layer number (None if outside the layers) and the rest."""
        if not name.startswith(f"{self.path}."):
            return None, name
        number, _, inner = name.removeprefix(f"{self.path}.").partition(".")
        return int(number), inner


def _largest_list(model: PreTrainedModel) -> str:
    lists = dict(outermost_lists(model))
    # A multimodal model has other towers in addition to its text decoder.
    decoder = set(model.get_decoder().modules())
    lists = {name: layers for name, layers in lists.items() if layers in decoder} or lists
    sizes = {name: _parameters(layers) for name, layers in lists.items() if _holds_matrices(layers)}
    ranked = sorted(sizes, key=lambda name: -sizes[name])
    looked = ", ".join(f"{name} ({len(lists[name])} modules)" for name in ranked) or "no ModuleList with matrices"
    if not ranked or (len(ranked) > 1 and sizes[ranked[1]] > 0.5 * sizes[ranked[0]]):
        raise ModelError(
            f"the decoder layers of {type(model).__name__} cannot be identified: found {looked}",
            expected="one outermost torch.nn.ModuleList that holds most of the parameters",
            fix="name it in the recipe, for example decoder_layers: model.layers",
        )
    return ranked[0]


def prunable_matrices(layer: nn.Module, prefix: str) -> Iterator[Matrix]:
    """Yield the matrices of a decoder layer, in the order of its modules.

    These are the weights of Linear and Conv1D modules and the fused weights of experts; routers are skipped.
    """
    for module_name, module in layer.named_modules():
        if not ROUTER_NAMES.isdisjoint(module_name.split(".")):
            continue
        full = ".".join(part for part in (prefix, module_name) if part)
        if type(module).__name__ in STACKED:
            yield from _stacked_matrices(module, module_name, full)
        elif isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape
            shape = (columns, rows) if transposed else (rows, columns)
            routed = EXPERT_NUMBER.search(full) is not None
            yield Matrix(full, _join(module_name, "weight"), None, transposed, shape, routed=routed)
        elif not isinstance(module, nn.Conv1d | nn.Conv2d):
            yield from _expert_matrices(module, module_name, full)


def _expert_matrices(module: nn.Module, module_name: str, full: str) -> Iterator[Matrix]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and min(parameter.shape[1:]) > 1 and "bias" not in name:
            transposed = getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED_EXPERTS)
            yield from _split(module, parameter.shape, module_name, full, name, transposed)


def _stacked_matrices(module: nn.Module, module_name: str, full: str) -> Iterator[Matrix]:
    count, plain, transposed = STACKED[type(module).__name__]
    experts = getattr(module, count)
    for name in plain + transposed:
        rows, columns = module.get_parameter(name).shape
        size = experts, rows // experts, columns
        yield from _split(module, size, module_name, full, name, name in transposed)


def _split(
    module: nn.Module, size: Sequence[int], module_name: str, full: str, name: str, transposed: bool
) -> Iterator[Matrix]:
    experts, rows, columns = size
    shape = (columns, rows) if transposed else (rows, columns)
    parameter = _join(module_name, name)
    # Only names distinguish experts from blocks: that of the module's class, or its name in the layer.
    routed = "expert" in f"{parameter} {type(module).__name__}".lower()
    for expert in range(experts):
        yield Matrix(f"{full}.{expert}.{name}", parameter, expert, transposed, shape, experts, routed)


def _named_list(model: PreTrainedModel, path: str) -> nn.ModuleList:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.ModuleList) or not len(module):
        lists = ", ".join(name for name, _ in outermost_lists(model)) or "none"
        raise ModelError(
            f"decoder_layers: {path!r} is not a list of modules in {type(model).__name__}",
            expected=f"one of its ModuleLists: {lists}",
        )
    return module


def outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules that lie in no other, with their names."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in found):
            found.append(name)
            yield name, module


def _holds_matrices(layers: nn.ModuleList) -> bool:
    return any(True for layer in layers for _ in prunable_matrices(layer, ""))


def _require_separate(layers: nn.ModuleList, path: str) -> None:
    owners: dict[int, str] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            owner = owners.setdefault(id(parameter), f"{path}.{index}")
            if owner != f"{path}.{index}":
                raise ModelError(
                    f"{owner} and {path}.{index} share the parameter {name}",
                    expected="decoder layers that can be pruned one at a time, each with its own parameters",
                    fix="this architecture cannot be streamed layer by layer",
                )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _join(module_name: str, parameter: str) -> str:
    return f"{module_name}.{parameter}" if module_name else parameter
