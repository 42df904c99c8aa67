"""Make a model physically smaller while it streams.

Two models are involved: the dense one, whose layers stream at full size, and the result, which only has a config until
its layers are written. A layer arrives at full size, its groups are removed (`structures.reducing`), and what is left
is moved into the result's layer, which replaces it from then on: it is pruned further, run, and stored.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.errors import CheckpointError, ModelError
from llmprune.models.source import Smaller, StoredSource
from llmprune.recipe.structures import Groups, GroupSection
from llmprune.storage.report import MatchRow, StructureRow
from llmprune.stream.activations import HiddenStates
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.decisions import Decisions, label
from llmprune.structures.find.discovery import Structure
from llmprune.structures.find.subblocks import SubBlock, without
from llmprune.structures.merging import merge_run
from llmprune.structures.narrowed_source import WidthSource
from llmprune.structures.reducing import Target, reduce_layer
from llmprune.structures.removable import Removable
from llmprune.structures.remove.cuts import Cut, removed_indices, shrink
from llmprune.structures.remove.problem import RemovalSettings
from llmprune.structures.replacing import replace_run


class Reduction:
    """The reduction of one checkpoint to a smaller one, once it is decided what is removed.

    Apart from which of the result's layers is resident, it does not change.

    Args:
        found: what can be removed.
        decisions: what is removed; before any text is read, `found.preview()`, which says how much but not which.

    Attributes:
        dense: the checkpoint being pruned.
        source: what streams: the dense checkpoint, or its narrowed version if hidden channels are removed.
        numbers: old number of each kept layer -> new number.
        result: the smaller checkpoint. Layers already committed can be loaded from it.

    Raises:
        ModelError: no config describes the result.
    """

    def __init__(self, found: Removable, decisions: Decisions) -> None:
        self.found, self.decisions, self.dense = found, decisions, found.dense
        self.source: StoredSource = found.dense
        if found.width is not None and decisions.channels is not None:
            self.source = WidthSource(found.dense, found.width, decisions.channels, decisions.factors)
        config, numbers = found.described(decisions)
        self.numbers: Mapping[int, int] = numbers
        self.result = found.dense.rewritten(config)
        self._resident: int | None = None

    def reduce(
        self, layer: ResidentLayer, min_tokens: int, step: Callable[[str], None]
    ) -> tuple[list[Cut], list[StructureRow]]:
        """Remove groups from a resident layer, and replace it by the result's layer.

        Args:
            layer: at full size, one that is kept.
            min_tokens: as for `solving.solve_layer`.
            step: called with a description of each step.
        """
        self.free()
        number = self._resident = self.numbers[layer.index]
        small = self.result.layers[number]
        name = self.result.layer_name(number)
        gone = [SubBlock("attention", modules)] if (modules := self.decisions.blocks.get(layer.index)) else []
        with without(layer.module, layer.index, gone):
            layer.become(layer.module, name)
            cuts, rows = reduce_layer(layer, self._targets(layer), min_tokens, step)
            state = {**dict(layer.module.named_parameters()), **dict(layer.module.named_buffers())}
        _adopt(small, shrink({key: tensor.detach() for key, tensor in state.items()}, cuts), name)
        layer.become(small, name)
        self.source.free_layer(layer.index)  # the kept tensors are shared
        return cuts, rows

    def removed_after(self, index: int) -> tuple[int, ...]:
        """The removed layers directly after a kept one."""
        last = next((kept for kept in self.decisions.layers if kept > index), len(self.dense.layers))
        return tuple(range(index + 1, last))

    @property
    def replaces(self) -> bool:
        """Whether kept layers are changed so that they stand for the removed ones after them."""
        depth = self.found.spec.depth
        return depth is not None and depth.replace is not None

    def replace(self, layer: ResidentLayer, inputs: HiddenStates, targets: HiddenStates) -> MatchRow:
        """Let a resident layer, still at full size, stand for the removed layers after it.

        Args:
            layer: one that `removed_after` names layers for.
            inputs: what it is run on.
            targets: the outputs of the last of these layers.
        """
        depth = self.found.spec.depth
        assert depth is not None
        if self.found.mergeable is not None:
            settings, removed = RemovalSettings(depth.damping), self.removed_after(layer.index)
            row = merge_run(layer, removed, self.found.mergeable, inputs, targets, settings)
        else:
            row = replace_run(layer, self.found.mlps[layer.index], inputs, targets, depth.damping)
        return replace(row, layer=self.result.layer_name(self.numbers[layer.index]))

    def replay(self, layer: ResidentLayer) -> None:
        """Replace a resident layer by its committed result."""
        self.free()
        number = self._resident = self.numbers[layer.index]
        self.result.load_layer(number, layer.stream.settings.device)
        layer.become(self.result.layers[number], self.result.layer_name(number))

    def free(self) -> None:
        """Release the result's layer that replaced the previous one."""
        if self._resident is not None:
            self.result.free_layer(self._resident)
        self._resident = None

    def tensors(self, layer: ResidentLayer, cuts: Sequence[Cut]) -> dict[str, Tensor]:
        """The tensors that the checkpoint stores for a reduced layer, under the checkpoint's own keys."""
        old, new = layer.index, self.numbers[layer.index]
        kept = {place: _kept(self._size(old, place), gone) for place, gone in removed_indices(cuts).items()}
        tensors = self.source.checkpoint_tensors(old, layer.replaced, Smaller(self.result.model, layer.module, kept))
        return _renumbered(tensors, old, new)

    def _size(self, index: int, place: tuple[str, int]) -> int:
        name, dim = place
        layer = self.dense.layers[index]
        return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}[name].shape[dim]

    def _targets(self, layer: ResidentLayer) -> list[Target]:
        counts = self.decisions.groups.get(layer.index, {})
        removed = self.decisions.removed.get(layer.index, {})
        there = dict(layer.module.named_parameters())
        return [
            _target(s, section, counts[label(s)], removed.get(label(s)))
            for s, section in self.found.structures[layer.index]
            if counts.get(label(s)) and s.consumer in there  # not in a removed block
        ]


def _target(
    structure: Structure, section: GroupSection, remove: int, removed: tuple[tuple[int, ...], ...] | None
) -> Target:
    if not isinstance(section, Groups):
        return Target(structure, remove, section.method, refit=False)
    settings = RemovalSettings(section.damping, section.swaps, structure.partitions, section.refitted)
    compensate = section.compensate if section.method == "flap" and not section.refitted else False
    return Target(structure, remove, section.method, section.refitted, settings, compensate, removed)


def _adopt(layer: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Assign tensors to a layer without weights by name.

    Raises:
        ModelError: a tensor is missing, or its shape is not the one in the config.
    """
    device = next(iter(tensors.values())).device
    for module_name, module in layer.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            full = f"{module_name}.{own}" if module_name else own
            if full not in tensors or tensors[full].shape != parameter.shape:
                shape = list(tensors[full].shape) if full in tensors else "missing"
                raise ModelError(f"{name}.{full} is {shape}, but the smaller model needs {list(parameter.shape)}")
            setattr(module, own, nn.Parameter(tensors[full], requires_grad=False))
        for own, buffer in list(module.named_buffers(recurse=False)):
            full = f"{module_name}.{own}" if module_name else own
            loaded = tensors.get(full)
            same = loaded is not None and loaded.shape == buffer.shape
            setattr(module, own, loaded if same else buffer.to(device))


def _kept(size: int, gone: Iterable[int]) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[list(gone)] = False
    return kept.nonzero().view(-1)


def _renumbered(tensors: Mapping[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """The tensors of a decoder layer under a new layer number.

    Raises:
        CheckpointError: the layer number is not found in the keys.
    """
    if old == new:
        return dict(tensors)
    split = [key.split(".") for key in tensors]
    shared = next(
        (place for place, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1), min(map(len, split))
    )
    places = [place for place in range(shared) if split[0][place] == str(old)]
    if not places:
        raise CheckpointError(
            f"the keys of decoder layer {old} do not contain its number: {next(iter(tensors))}",
            fix="leave depth out of the recipe's structures",
        )
    return {
        ".".join([*parts[: places[0]], str(new), *parts[places[0] + 1 :]]): tensor
        for parts, tensor in zip(split, tensors.values(), strict=True)
    }
