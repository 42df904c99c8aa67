"""What a recipe can remove from a model: found once and checked, before any text is read.

Nothing is decided here. Whatever the decisions will be, there must be as many structures, layers and blocks as the
recipe removes, and a config that describes what is left; anything else is refused now, in a dry run as in a real run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from llmprune.errors import ModelError, RecipeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.sizes import active_experts
from llmprune.recipe.structures import Channels, Groups, GroupSection, Structures
from llmprune.recipe.structures import Width as WidthSection
from llmprune.structures.choose.depth_scores import check_count, layer_candidates
from llmprune.structures.decisions import Decisions, aligned, label, some_cut
from llmprune.structures.describe.configuration import smaller_config, uneven_config
from llmprune.structures.describe.depth import drop_layers, without_blocks
from llmprune.structures.draft_head import DraftHead, find_draft_head
from llmprune.structures.find.discovery import Structure, find_query_heads, find_structures
from llmprune.structures.find.mlp_outputs import MlpOutput, find_mlp_outputs
from llmprune.structures.find.subblocks import Part, SubBlock, SubBlocks, find_subblocks
from llmprune.structures.mergeable import Mergeable, find_mergeable
from llmprune.structures.remove.cuts import Cut
from llmprune.structures.remove.width import Width, plan_width

# A layer's structures that lose groups, each with its section of the recipe, as it applies to its consumer.
Asked = tuple[tuple[Structure, GroupSection], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Removable:
    """What a recipe's `structures` refer to in one checkpoint.

    Attributes:
        dense: the checkpoint being pruned.
        spec: what is to be removed.
        structures: for each layer, the structures that lose groups; none of them is refused.
        blocks: for each layer, its attention and MLP; empty if no blocks are to be removed.
        width: how the hidden width is narrowed; None if it is not.
        draft_head: dropped, because it would not fit the smaller model; None if there is none.
        mlps: for each layer, what writes its MLP's output, if a map of that is to stand for removed layers; otherwise
            empty.
        mergeable: what it takes to merge layers; None if none are merged.
    """

    dense: CheckpointSource
    spec: Structures
    structures: tuple[Asked, ...]
    blocks: Sequence[SubBlocks]
    width: Width | None
    draft_head: DraftHead | None = None
    mlps: Sequence[MlpOutput] = ()
    mergeable: Mergeable | None = None

    @classmethod
    def find(cls, dense: CheckpointSource, spec: Structures) -> "Removable":
        """Find everything that the recipe refers to; no weights are read.

        Raises:
            RecipeError: there is nothing of the kind to remove, or not enough of it.
            ModelError: a structure or a block cannot be removed exactly, no config allows the hidden width, or the
                checkpoint has tensors of which nobody knows whether they would fit.
        """
        draft_head = find_draft_head(dense, spec)
        found = find_structures(dense.decoder)
        blocks = find_subblocks(dense.decoder, found) if spec.blocks else []
        replaced = spec.depth.replace if spec.depth else None
        mlps = _mlp_outputs(dense, found) if replaced == "linear" else []
        mergeable = find_mergeable(dense, found) if replaced == "merge" else None
        if spec.heads and spec.heads.unit == "query-head":
            found = _query_heads(dense, found)
        sections = [[(structure, _section(dense, spec, structure)) for structure in own] for own in found]
        structures = tuple(tuple((s, section) for s, section in own if section is not None) for own in sections)
        _require_structures(dense, spec, structures)
        _require_layers_and_blocks(dense, spec, blocks)
        return cls(dense, spec, structures, blocks, _plan_width(dense, spec.width), draft_head, mlps, mergeable)

    def preview(self) -> Decisions:
        """What is known before any text is read: how much is removed, but not which.

        Raises:
            RecipeError: a structure has too few groups.
        """
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
        """The number of groups to remove from each structure if all layers lose the same fraction."""
        return {
            layer: {label(s): _count(s, section) for s, section in own if section.remove is not None}
            for layer, own in enumerate(self.structures)
        }

    def described(self, decisions: Decisions) -> tuple[PretrainedConfig, dict[int, int]]:
        """The config of the smaller model, and the new number of each kept layer.

        Args:
            decisions: how much of what is removed; which groups and channels does not matter here.

        Raises:
            ModelError: no config describes it.
        """
        cuts: dict[int, list[Cut]] = {}
        for layer, own in enumerate(self.structures):
            counts = decisions.groups.get(layer, {})
            cuts[layer] = [some_cut(s, counts[label(s)]) for s, _ in own if counts.get(label(s))]
        path = self.dense.layers_path
        config = self.dense.config if self.width is None else self.width.config
        if any(cuts.values()):
            uneven = self.spec.budget is not None
            config = (uneven_config if uneven else smaller_config)(config, cuts, path)
        if decisions.blocks:
            config = without_blocks(config, decisions.blocks, path)
        return drop_layers(config, decisions.layers, path)


def _mlp_outputs(dense: CheckpointSource, found: Sequence[Sequence[Structure]]) -> list[MlpOutput]:
    """What writes the output of each layer's MLP, any of which may have to stand for removed layers."""
    outputs = find_mlp_outputs(dense.decoder, found)
    for index, output in enumerate(outputs[:-1]):
        if output.refusal is not None:
            raise ModelError(
                f"{dense.layer_name(index)} cannot stand for removed layers: {output.refusal}",
                expected="an MLP whose output is added to the residual stream as its last matrix gives it",
                fix="leave replace out of structures.depth; `reconstruct` also makes up for removed layers",
            )
    return outputs


def _query_heads(dense: CheckpointSource, found: Sequence[Sequence[Structure]]) -> list[list[Structure]]:
    """The structures, with individual query heads instead of whole KV groups."""
    heads = find_query_heads(dense.decoder)
    result = []
    for own, single in zip(found, heads, strict=True):
        # If each query head has its own KV head, the KV groups are already single query heads.
        exact = [structure for structure in single if structure.refusal is None]
        replaced = {structure.consumer for structure in exact}
        result.append([*exact, *(s for s in own if s.kind != "heads" or s.consumer not in replaced)])
    return result


def _plan_width(dense: CheckpointSource, section: WidthSection | None) -> Width | None:
    if section is None:
        return None
    size = int(dense.config.get_text_config(decoder=True).hidden_size)
    remove = section.count(size)
    if not 0 < remove < size:
        raise RecipeError(
            f"width.remove: {section.remove} removes {remove} of {size} hidden channels",
            expected=f"between 1 and {size - 1} of them",
            fix=f"set structures.width.remove to a fraction such as 0.25, or to {size // 4}",
        )
    kept = aligned(size, size - remove, _multiple("width", section, size))
    return plan_width(dense.config, kept, path=dense.layers_path)


def _count(structure: Structure, section: GroupSection) -> int:
    """How many groups of a structure are removed."""
    among, partitions = structure.groups, structure.partitions
    remove = section.count(among // partitions) * partitions
    if isinstance(section, Channels) and 0 < remove < among:
        remove = among - aligned(among, among - remove, _multiple("ffn", section, among))
    if not 0 < remove < among:
        each = among // partitions
        where = f" of each of {partitions} partitions" if partitions > 1 else ""
        raise RecipeError(
            f"{structure.kind}.remove: {section.remove} removes {remove} of {among} groups of {structure.consumer}",
            expected=f"between 1 and {each - 1}{where}",
            fix=f"set structures.{structure.kind}.remove to a number such as {max(each // 4, 1)}",
        )
    return remove


def _section(dense: CheckpointSource, spec: Structures, structure: Structure) -> GroupSection | None:
    """The section of the recipe for a structure, as it applies to its consumer."""
    section = spec.groups.get(structure.kind)
    if not isinstance(section, Groups):
        return section
    bias = f"{structure.consumer.removesuffix('.weight')}.bias"
    return section.with_bias(any(bias in dict(layer.named_parameters()) for layer in dense.layers))


def _require_structures(dense: CheckpointSource, spec: Structures, structures: Sequence[Asked]) -> None:
    """Check that every section finds something that can be removed."""
    for kind in spec.groups:
        own = [structure for layer in structures for structure, _ in layer if structure.kind == kind]
        refused = [structure for structure in own if structure.refusal]
        if refused:
            raise ModelError(
                f"{kind} of {type(dense.model).__name__} cannot be removed: {refused[0].consumer}: "
                f"{refused[0].refusal}",
                fix=f"leave {kind} out of the recipe's structures",
            )
        if not own:
            raise RecipeError(
                f"{type(dense.model).__name__} has no {kind} that can be removed",
                fix=f"leave {kind} out of the recipe's structures",
            )


def _require_layers_and_blocks(dense: CheckpointSource, spec: Structures, found: Sequence[SubBlocks]) -> None:
    """Check that as many layers and blocks can be removed as the recipe asks for, whichever they are."""
    layers, gone = len(dense.layers), 0
    if spec.depth is not None:
        gone = spec.depth.count(layers)
        candidates = layer_candidates(layers, spec.depth.protect, first=bool(spec.depth.replace))
        check_count(gone, len(candidates), layers, "layers")
    for part, section in spec.blocks.items():
        _require_blocks(dense, part, [blocks[part] for blocks in found], section.count(layers - gone))


def _require_blocks(dense: CheckpointSource, part: Part, found: Sequence[SubBlock], count: int) -> None:
    removable = {index: block for index, block in enumerate(found) if block.refusal is None}
    name = "attention" if part == "attention" else "MLP"
    if not removable:
        raise ModelError(
            f"no {name} block of {type(dense.model).__name__} can be removed: {found[0].refusal}",
            expected="blocks whose output is added to the residual stream and read by nothing else",
            fix=f"leave {part} out of the recipe's structures, or use depth to remove whole layers",
        )
    kept = [f" (not that of layer {i}: {block.refusal})" for i, block in enumerate(found) if block.refusal]
    check_count(count, len(removable), len(dense.layers), f"{name} blocks{kept[0] if kept else ''}")
    # Some architectures have no config that could describe the result.
    index, block = next(iter(removable.items()))
    without_blocks(dense.config, {index: block.modules}, dense.layers_path)


def _multiple(kind: str, section: Channels | WidthSection, among: int) -> int | str:
    """The multiple for the number of kept channels."""
    multiple: int | str = section.multiple
    if multiple != "auto" and int(multiple) > among:
        raise RecipeError(
            f"{kind}.multiple is {multiple}, but there are only {among} channels",
            expected=f"a multiple of at most {among}",
            fix=f"set structures.{kind}.multiple to auto, or to 1",
        )
    return multiple
