"""Make a model physically smaller while it streams.

Two models take part: the dense one, whose layers stream at full size, and the result, which is known by its config
alone until its layers are written. A layer arrives at full size, loses its groups (`structures.reducing`), and hands
what is left to the result's layer, which stands for it from then on: it is pruned further, run, and stored.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llmprune.errors import CheckpointError, ModelError, RecipeError
from llmprune.models.checkpoint_source import CheckpointSource, Smaller
from llmprune.models.sizes import active_experts
from llmprune.recipe.structures import Groups, Structures
from llmprune.storage.report import StructureRow
from llmprune.stream.stream import ResidentLayer
from llmprune.structures.choose.depth_scores import check_count
from llmprune.structures.decisions import Decisions, aligned, label, some_cut
from llmprune.structures.describe.configuration import smaller_config, uneven_config
from llmprune.structures.describe.depth import drop_layers, without_blocks
from llmprune.structures.find.discovery import Structure, find_query_heads, find_structures
from llmprune.structures.find.subblocks import PARTS, Block, Part, find_blocks, without
from llmprune.structures.narrowed_source import WidthSource
from llmprune.structures.reducing import Target, reduce_layer
from llmprune.structures.remove.cuts import Cut, removed_indices, shrink
from llmprune.structures.remove.problem import RemovalSettings
from llmprune.structures.remove.width import Width, plan_width


class Reduction:
    """The way of one checkpoint to a smaller one.

    Args:
        dense: what is pruned.
        spec: what is removed.

    Attributes:
        structures: of each layer those that lose groups, with the section of the recipe that says so.
        numbers: old number of each layer that stays -> new number; once settled.
        result: the smaller checkpoint; once settled. Layers that are committed can be loaded from it.

    Raises:
        RecipeError: there is nothing of the kind to remove, or not as many.
        ModelError: a structure cannot be removed exactly, or no config describes what is left.
    """

    result: CheckpointSource
    source: CheckpointSource | WidthSource

    def __init__(self, dense: CheckpointSource, spec: Structures) -> None:
        self.dense, self.spec, self._path = dense, spec, dense.layers_path
        found = find_structures(dense.decoder)
        self.blocks = find_blocks(dense.decoder, found) if spec.attention or spec.mlp else []
        if spec.heads and spec.heads.unit == "query-head":
            found = self._query_heads(found)
        self.structures = [
            [(structure, section) for structure in own if (section := self._section(structure)) is not None]
            for own in found
        ]
        self._require_structures()
        self._require_layers_and_blocks()
        self.width = self._plan_width()
        self.numbers: dict[int, int] = {}
        self._resident: int | None = None
        # Whatever will be decided, there must be a config that says so many.
        self.settle(self.preview())

    def preview(self) -> Decisions:
        """What is known before any text was read: how much goes, and not which."""
        width = self.width
        return Decisions(
            tuple(range(len(self.dense.layers))),
            self.uniform_groups(),
            channels=None if width is None else tuple(range(width.kept)),
            factors={} if width is None else dict.fromkeys(width.norms, 1.0),
        )

    @property
    def active(self) -> float:
        """The fraction of the routed experts that a token reaches; 1 without experts."""
        return active_experts(self.dense.config)

    def uniform_groups(self) -> dict[int, dict[str, int]]:
        """What goes if every layer loses as much."""
        return {
            layer: {label(s): self._count(s, section) for s, section in own if section.remove is not None}
            for layer, own in enumerate(self.structures)
        }

    def settle(self, decisions: Decisions) -> None:
        """Describe the result of these decisions.

        Raises:
            ModelError: no config describes it.
        """
        self.decisions = decisions
        self.source = self.dense
        if self.width is not None and decisions.channels is not None:
            self.source = WidthSource(self.dense, self.width, decisions.channels, decisions.factors)
        config, self.numbers = self._config(decisions)
        self.result = self.dense.rewritten(config)

    def reduce(
        self, layer: ResidentLayer, min_tokens: int, step: Callable[[str], None]
    ) -> tuple[list[Cut], list[StructureRow]]:
        """Take out of a resident layer what goes, and let the result's layer stand for it.

        Args:
            layer: at full size, one that stays.
            min_tokens: as for `solving.solve_layer`.
            step: told what happens.
        """
        self.free()
        number = self._resident = self.numbers[layer.index]
        small = self.result.layers[number]
        name = self.result.layer_name(number)
        gone = [Block("attention", modules)] if (modules := self.decisions.blocks.get(layer.index)) else []
        with without(layer.module, layer.index, gone):
            layer.become(layer.module, name)
            cuts, rows = reduce_layer(layer, self._targets(layer), min_tokens, step)
            state = {**dict(layer.module.named_parameters()), **dict(layer.module.named_buffers())}
        _adopt(small, shrink({key: tensor.detach() for key, tensor in state.items()}, cuts), name)
        layer.become(small, name)
        self.source.free_layer(layer.index)  # what stays is shared
        return cuts, rows

    def replay(self, layer: ResidentLayer) -> None:
        """Let a layer that is committed stand for a resident one."""
        self.free()
        number = self._resident = self.numbers[layer.index]
        self.result.load_layer(number, layer.stream.settings.device)
        layer.become(self.result.layers[number], self.result.layer_name(number))

    def free(self) -> None:
        """Let go of the result's layer that stood for the last one."""
        if self._resident is not None:
            self.result.free_layer(self._resident)
        self._resident = None

    def tensors(self, layer: ResidentLayer, cuts: Sequence[Cut]) -> dict[str, Tensor]:
        """What the checkpoint stores of a reduced layer, under the keys that it has there."""
        old, new = layer.index, self.numbers[layer.index]
        kept = {place: _kept(self._size(old, place), gone) for place, gone in removed_indices(cuts).items()}
        tensors = self.source.checkpoint_tensors(old, layer.replaced, Smaller(self.result.model, layer.module, kept))
        return _renumbered(tensors, old, new)

    def _size(self, index: int, place: tuple[str, int]) -> int:
        name, dim = place
        layer = self.dense.layers[index]
        return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}[name].shape[dim]

    def _config(self, decisions: Decisions) -> tuple[PretrainedConfig, dict[int, int]]:
        """The config that describes the result, and the new numbers of its layers."""
        cuts: dict[int, list[Cut]] = {}
        for layer, own in enumerate(self.structures):
            counts = decisions.groups.get(layer, {})
            # Which groups go does not matter here, only how many.
            cuts[layer] = [some_cut(s, counts[label(s)]) for s, _ in own if counts.get(label(s))]
        config = self.dense.config if self.width is None else self.width.config
        if any(cuts.values()):
            uneven = self.spec.budget is not None
            config = (uneven_config if uneven else smaller_config)(config, cuts, self._path)
        if decisions.blocks:
            config = without_blocks(config, decisions.blocks, self._path)
        return drop_layers(config, decisions.layers, self._path)

    def _targets(self, layer: ResidentLayer) -> list[Target]:
        counts = self.decisions.groups.get(layer.index, {})
        removed = self.decisions.removed.get(layer.index, {})
        there = dict(layer.module.named_parameters())
        return [
            _target(s, section, counts[label(s)], removed.get(label(s)))
            for s, section in self.structures[layer.index]
            if counts.get(label(s)) and s.consumer in there  # not in a block that goes
        ]

    def _query_heads(self, found: Sequence[Sequence[Structure]]) -> list[list[Structure]]:
        """The structures, with single query heads in the place of whole KV groups."""
        heads = find_query_heads(self.dense.decoder)
        result = []
        for own, single in zip(found, heads, strict=True):
            # Where each query head has its key and value to itself, they are the groups already.
            exact = [structure for structure in single if structure.refusal is None]
            replaced = {structure.consumer for structure in exact}
            result.append([*exact, *(s for s in own if s.kind != "heads" or s.consumer not in replaced)])
        return result

    def _plan_width(self) -> Width | None:
        section = self.spec.width
        if section is None:
            return None
        size = int(self.dense.config.get_text_config(decoder=True).hidden_size)
        remove = section.count(size)
        if not 0 < remove < size:
            raise RecipeError(
                f"width.remove: {section.remove} takes {remove} of {size} hidden channels",
                expected=f"between 1 and {size - 1} of them",
                fix=f"set structures.width.remove to a fraction such as 0.25, or to {size // 4}",
            )
        return plan_width(
            self.dense.config, aligned(size, size - remove, _multiple("width", section, size)), path=self._path
        )

    def _count(self, structure: Structure, section: Any) -> int:
        """How many groups of a structure go."""
        among, partitions = structure.groups, structure.partitions
        remove = section.count(among // partitions) * partitions
        if structure.kind == "ffn" and 0 < remove < among:
            remove = among - aligned(among, among - remove, _multiple("ffn", section, among))
        if not 0 < remove < among:
            each = among // partitions
            where = f" of each of {partitions} partitions" if partitions > 1 else ""
            raise RecipeError(
                f"{structure.kind}.remove: {section.remove} takes {remove} of {among} groups of {structure.consumer}",
                expected=f"between 1 and {each - 1}{where}",
                fix=f"set structures.{structure.kind}.remove to a number such as {max(each // 4, 1)}",
            )
        return remove

    def _section(self, structure: Structure) -> Any:
        """The section of the recipe that speaks of a structure, as it holds for its consumer."""
        section = self.spec.sections.get(structure.kind)
        if not isinstance(section, Groups):
            return section
        bias = f"{structure.consumer.removesuffix('.weight')}.bias"
        return section.with_bias(any(bias in dict(layer.named_parameters()) for layer in self.dense.layers))

    def _require_structures(self) -> None:
        """Every section finds something that can be removed."""
        for kind in ("heads", "ffn", "experts"):
            if kind not in self.spec.sections:
                continue
            own = [structure for layer in self.structures for structure, _ in layer if structure.kind == kind]
            refused = [structure for structure in own if structure.refusal]
            if refused:
                raise ModelError(
                    f"{kind} of {type(self.dense.model).__name__} cannot be removed: {refused[0].consumer}: "
                    f"{refused[0].refusal}",
                    fix=f"leave {kind} out of the recipe's structures",
                )
            if not own:
                raise RecipeError(
                    f"{type(self.dense.model).__name__} has no {kind} that can be removed",
                    fix=f"leave {kind} out of the recipe's structures",
                )

    def _require_layers_and_blocks(self) -> None:
        """As many layers and blocks can go as the recipe wants, whichever they are."""
        layers, gone = len(self.dense.layers), 0
        if self.spec.depth is not None:
            gone = self.spec.depth.count(layers)
            check_count(gone, layers - self.spec.depth.protect, layers, "layers")
        for part in PARTS:
            section = getattr(self.spec, part)
            if section is not None:
                self._require_blocks(part, section.count(layers - gone), layers)

    def _require_blocks(self, part: Part, count: int, layers: int) -> None:
        found = [blocks[part] for blocks in self.blocks]
        removable = {index: block for index, block in enumerate(found) if block.refusal is None}
        name = "attention" if part == "attention" else "MLP"
        if not removable:
            raise ModelError(
                f"no {name} block of {type(self.dense.model).__name__} can be removed: {found[0].refusal}",
                expected="blocks that are added to the hidden states, and that nothing else reads",
                fix=f"leave {part} out of the recipe's structures, or remove whole layers by depth",
            )
        kept = [f" (layer {i} keeps its own: {block.refusal})" for i, block in enumerate(found) if block.refusal]
        check_count(count, len(removable), layers, f"{name} blocks{kept[0] if kept else ''}")
        # Some architectures have no config that could say it.
        index, block = next(iter(removable.items()))
        without_blocks(self.dense.config, {index: block.modules}, self._path)


def _multiple(kind: str, section: Any, among: int) -> int | str:
    """What the channels that stay are a multiple of."""
    multiple: int | str = section.multiple
    if multiple != "auto" and int(multiple) > among:
        raise RecipeError(
            f"{kind}.multiple is {multiple}, but there are {among} channels",
            expected=f"a multiple of at most {among}",
            fix=f"set structures.{kind}.multiple to auto, or to 1",
        )
    return multiple


def _target(structure: Structure, section: Any, remove: int, removed: Any) -> Target:
    if not isinstance(section, Groups):
        return Target(structure, remove, section.method, refit=False)
    settings = RemovalSettings(section.damping, section.swaps, structure.partitions, section.refitted)
    compensate = section.compensate if section.method == "flap" and not section.refitted else False
    return Target(structure, remove, section.method, section.refitted, settings, compensate, removed)


def _adopt(layer: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Put tensors into a layer without weights, each under its name.

    Raises:
        ModelError: one has another shape than the config says, or is missing.
    """
    device = next(iter(tensors.values())).device
    for module_name, module in layer.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            full = f"{module_name}.{own}" if module_name else own
            if full not in tensors or tensors[full].shape != parameter.shape:
                shape = list(tensors[full].shape) if full in tensors else "missing"
                raise ModelError(f"{name}.{full} is {shape}, the smaller model wants {list(parameter.shape)}")
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
    """Tensors of a decoder layer under another number.

    Raises:
        CheckpointError: the keys do not show where the number stands.
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
            f"the keys of decoder layer {old} do not show its number: {next(iter(tensors))}",
            fix="leave depth out of the recipe's structures",
        )
    return {
        ".".join([*parts[: places[0]], str(new), *parts[places[0] + 1 :]]): tensor
        for parts, tensor in zip(split, tensors.values(), strict=True)
    }
