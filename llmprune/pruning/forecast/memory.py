"""How much memory a run will take: a formula for its peak.

    peak = what the process holds before the first layer
         + libraries
         + max( ends + hidden states + calls,
                hidden states + calls + max over layers of
                    ( weights + max(statistics + held-back rows + max(forward, solving), matching, replacing) ) )

libraries       3 MB on a CPU: what kernels keep for their threads from the first products of a kind on, and what the
                heap holds in small pieces
ends            embeddings, final norm and LM head, while text is embedded; no layer is in memory at that time. Tensors
                that the model does not read, such as a draft head, are copied 4 MB at a time and take nothing
hidden states   samples x length x hidden size, at most `activation_budget` (the rest is on disk); with block matching,
                corrected targets (`statistics.alpha`) or layers that stand for removed ones two to four sets of them
                (`Recipe.hidden_sets`)
calls           masks and rotary embeddings that the model passes to its layers; equal ones are stored once
weights         one decoder layer in the compute dtype; twice with corrected targets, for which the dense one is kept
statistics      4 d^2 bytes for each Gram of width d, 4 d for column norms; shared by matrices with the same input;
                twice that while a layer is observed if they are weighted by the loss, and twice with corrected targets
held-back rows  up to 1,024 rows of each group's input
forward         batch x length tokens x (6 hidden sizes + 3 widest dimensions) in the compute dtype; where statistics
                are collected, plus the squares of the widest input in float32, and a float32 copy of it if the
                compute dtype is narrower; with corrected targets, plus the inputs of all matrices, and errors of the
                widest, as they are and weighed, in float32
solving         what the method states for the current matrix (`Method.workspace`): for [o, i] 20 o i bytes, and 6 i^2
                more for SparseGPT; 4 o i + 4 i^2 more with corrected targets
matching        if layers are fitted as a whole: for each parameter trained at a time 16 bytes (float32 values, the
                gradient and both moments of Adam), 4 for the best epoch's, 1 for the mask and one in the compute dtype,
                which the layer runs with; 12 more for those of the largest matrix; and what the backward pass needs of
                one batch: inputs and outputs of all matrices that a token visits, and 8 hidden sizes in float32. In
                float16, all of this is in float32, and so is a copy of what is not trained. Of parts that are fitted in
                turn, the parameters of both once more
replacing       if layers stand for removed ones (structures.depth with `replace` or block matching): one of these, in
                the compute dtype, or the fit of `replace`: 40 d^2 bytes for the hidden size d, the matrices that take
                up the map (once more, and 12 bytes for each value of the largest), and four hidden states of a batch in
                float32; and a batch's forward. To merge two layers: the second one, a copy of the first, and for the
                matrices side by side, [o, i], 24 i^2 bytes and 12 o i, or 4 i^2 and what they read in a batch, twice

On a CPU, the measured peak is what the process has for itself, without pages of files: glibc's allocator is told from
the start to give blocks of 256 KB and more pages of their own, and libraries make their first products before the first
layer.

Not counted: the logits of an evaluation, of as many positions at a time as make 128 MB in float32 (`stream.windows`),
with their log-softmax for each of two models and the divergence up to 0.8 GB (`stream.guard.scoring_needs`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from llmprune.methods.correction import correction_bytes
from llmprune.models.sizes import active_experts, ends_bytes
from llmprune.models.source import Source
from llmprune.pruning.fitting import attention_names
from llmprune.pruning.jobs import Job
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.reconstruct import Reconstruct
from llmprune.recipe.sections import StatisticsOptions
from llmprune.statistics import Gram
from llmprune.stream.guard import scoring_needs
from llmprune.stream.matching import trained_parameters
from llmprune.stream.observation import HELD_BACK_ROWS, Group
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.structures.find.subblocks import SubBlocks
from llmprune.structures.plan import merged_shapes
from llmprune.structures.removable import Removable
from llmprune.text.tokens import Tokens
from llmprune.units import format_size


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes that a decoder layer takes while it is resident.

    Attributes:
        weights: its parameters.
        statistics: Grams and column norms of its groups.
        held_back: input rows kept to measure the relative output error.
        forward: activations of one batch.
        solving: workspace of its largest matrix.
        matching: what it takes to fit it as a whole; 0 if it is not.
        replacing: what it takes to let it stand for removed layers; 0 if it does not.
        shapes: (out, in) of the matrices that are pruned.
        gram_widths: width of every Gram.
    """

    weights: int
    statistics: int
    held_back: int
    forward: int
    solving: int
    matching: int = 0
    replacing: int = 0
    shapes: tuple[tuple[int, int], ...] = ()
    gram_widths: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Peak while the layer is resident."""
        pruning = self.statistics + self.held_back + max(self.forward, self.solving)
        return self.weights + max(pruning, self.matching, self.replacing)


def layer_memory(
    layer: ResidentLayer,
    groups: Sequence[Group] | None,
    jobs: dict[str, Job],
    batch_tokens: int,
    held_back_tokens: int,
    consumers: Sequence[tuple[int, int]] = (),
    options: StatisticsOptions | None = None,
) -> LayerMemory:
    """Apply the formula to a layer; its parameters may be on the meta device.

    Args:
        layer: the layer.
        groups: its groups of matrices with a common input; None if they are not known yet, which gives an upper bound,
            as if no two matrices shared an input.
        jobs: what is done to its matrices.
        batch_tokens: tokens in a forward pass.
        held_back_tokens: tokens that are excluded from the statistics.
        consumers: (out, in) of matrices from whose inputs groups are removed first; their statistics are freed before
            weights are pruned.
        options: of the statistics, as in the recipe; default: its defaults.
    """
    options = options or StatisticsOptions()
    corrected = bool(options.alpha and jobs)
    copies = (1 + (options.loss_weight != "none")) * (1 + corrected)
    if groups is None:
        widths = [(layer.matrices[name].shape[1], job.needs is Gram) for name, job in jobs.items()]
    else:
        widths = [(layer.matrices[group.names[0]].shape[1], isinstance(group.statistics, Gram)) for group in groups]
    shapes = [layer.matrices[name].shape for name in jobs]
    parameters = list(layer.module.parameters())
    itemsize = max((parameter.element_size() for parameter in parameters), default=4)
    every = [matrix.shape for matrix in layer.matrices.values()]
    widest = max((max(shape) for shape in every), default=0)
    # Nearly every matrix reads or writes hidden states; those of key and value heads, or of experts, are narrower.
    hidden = max((min(shape) for shape in every), default=0)
    kept_rows = itemsize * min(HELD_BACK_ROWS, held_back_tokens)
    observed = bool(consumers) or any(job.needs is not None for job in jobs.values())
    activations = itemsize * (6 * hidden + 3 * widest) + observed * (8 if itemsize < 4 else 4) * widest
    activations += corrected * (itemsize * sum(width for width, _ in widths) + 8 * widest)
    targets = [corrected * correction_bytes(layer.matrices[name].shape) for name in jobs]
    spaces = [job.workspace(layer.matrices[name].shape) for name, job in jobs.items()]
    solving = [space + target for space, target in zip(spaces, targets, strict=True)]
    # About five square matrices of this width (structures.remove.solver), and three float32 copies of the matrix.
    removing = [20 * width**2 + 12 * rows * width for rows, width in consumers]
    return LayerMemory(
        weights=(1 + corrected) * sum(parameter.nbytes for parameter in parameters),
        statistics=max(
            copies * sum(4 * width**2 if gram else 4 * width for width, gram in widths),
            sum(4 * width**2 for _, width in consumers),
        ),
        held_back=kept_rows * max(sum(width for width, _ in widths), sum(width for _, width in consumers)),
        forward=batch_tokens * activations,
        solving=max([*solving, *removing], default=0),
        shapes=tuple(shapes),
        gram_widths=tuple(width for width, gram in widths if gram),
    )


def matching_memory(
    layer: ResidentLayer,
    names: Collection[str],
    fitted: Reconstruct | None,
    batch_tokens: int,
    parts: SubBlocks | None = None,
) -> int:
    """What it takes to fit a layer as a whole; 0 if it is not.

    Args:
        layer: the layer; its parameters may be on the meta device.
        names: its matrices that are trained; none: it stays as it is.
        fitted: how; None: it is not.
        batch_tokens: tokens in a forward pass.
        parts: of the layer, if its attention is trained before the rest; None: all at once, which takes most.
    """
    if fitted is None or not names:
        return 0
    every = list(layer.module.parameters())
    widened = any(parameter.dtype == torch.float16 for parameter in every)
    itemsize = 4 if widened else max(parameter.element_size() for parameter in every)
    first = () if parts is None else attention_names(parts)
    windows: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in trained_parameters(layer, names, fitted.train):
        windows[name.startswith(first)].append(parameter)
    if not any(windows):
        return 0
    states = max(
        sum(p.numel() * (21 + (4 if widened else p.element_size())) for p in trained)
        + 12 * max((p.numel() for p in trained), default=0)
        + widened * 4 * (sum(p.numel() for p in every) - sum(p.numel() for p in trained))
        for trained in windows
    )
    if parts is not None:
        # As they were before the attention was trained, to go back to.
        states += sum(p.nbytes for trained in windows for p in trained)
    active = active_experts(layer.stream.source.model.config)
    seen = sum((active if m.routed else 1.0) * sum(m.shape) for m in layer.matrices.values())
    hidden = max((min(matrix.shape) for matrix in layer.matrices.values()), default=0)
    return states + round(batch_tokens * (itemsize * seen + 32 * hidden))


def library_bytes(device: torch.device) -> int:
    """What libraries and the heap take of the peak, whatever the model."""
    return 3 << 20 if device.type == "cpu" else 0


def replacing_memory(
    layer: ResidentLayer, found: Removable | None, fitted: Reconstruct | None, memory: LayerMemory, batch_tokens: int
) -> int:
    """What it takes to let a layer stand for removed ones; 0 if the recipe does not ask for it.

    Args:
        layer: the layer; its parameters may be on the meta device.
        found: what is removed; None: nothing.
        fitted: how the layer is fitted as a whole; None: it is not.
        memory: of the layer otherwise.
        batch_tokens: tokens in a forward pass.
    """
    if found is None or found.spec.depth is None or not (found.spec.depth.replace or fitted):
        return 0
    if found.mergeable is not None:
        shapes = merged_shapes(found.mergeable, layer.module)
        merging = max(max(24 * i**2 + 12 * o * i, 4 * i**2 + 8 * i * batch_tokens) for o, i in shapes)
        return 2 * memory.weights + merging + memory.forward
    if not found.mlps:
        return memory.weights + memory.forward
    output, parameters = found.mlps[layer.index], dict(layer.module.named_parameters())
    written = [parameters[name] for name in output.matrices]
    hidden = found.dense.config.get_text_config(decoder=True).hidden_size
    kept = sum(parameter.nbytes for parameter in written)
    largest = max(
        (m.shape[0] * m.shape[1] for m in layer.matrices.values() if m.parameter in output.matrices), default=0
    )
    fitting = 40 * hidden**2 + kept + 12 * largest + 16 * hidden * batch_tokens
    return max(memory.weights, fitting) + memory.forward


def predict_peak(ends: int, hidden_states: int, calls: int, layers: Sequence[LayerMemory], libraries: int) -> int:
    """The formula's peak in bytes, above what the process holds before the first layer.

    Args:
        ends: bytes outside the decoder layers.
        hidden_states: bytes of them in memory.
        calls: bytes that the model passes to its layers.
        layers: all of them, or only the one that takes most.
        libraries: bytes that they take.
    """
    between = hidden_states + calls + libraries
    return between + max([ends, *(layer.total for layer in layers)])


def pruning_needs(
    source: Source,
    jobs: Sequence[dict[str, Job]],
    texts: Mapping[str, Tokens],
    settings: StreamSettings,
    recipe: Recipe,
) -> str:
    """Say how much memory it takes to prune and to evaluate, before any layer has run.

    Args:
        source: the model.
        jobs: for each layer, what is done to its matrices.
        texts: "calibration", with the held-back samples, and, if perplexity is measured, "evaluation".
        settings: device, batch size and memory.
        recipe: of the run.
    """
    ids = texts["calibration"].ids
    stream = Stream(source, ids, settings)
    batch, held_back = stream.batches[0].numel(), settings.held_back * ids.shape[1]
    layers = []
    for index, job in enumerate(jobs):
        layer = ResidentLayer(stream, index)
        memory = layer_memory(layer, None, job, batch, held_back, options=recipe.statistics)
        fitted = job or (() if recipe.structures is None else layer.matrices)
        layers.append(replace(memory, matching=matching_memory(layer, fitted, recipe.reconstruct, batch)))
    hidden = ids.numel() * source.model.config.get_text_config().hidden_size * source.dtype.itemsize
    held = recipe.hidden_sets * min(hidden, settings.activation_budget)
    peak = predict_peak(ends_bytes(source), held, 0, layers, library_bytes(settings.device))
    needs = f"up to {format_size(peak)} for pruning, in addition to the program itself"
    if "evaluation" in texts:
        # Dense and pruned logits of some positions are in memory together to be compared.
        needs += f", and {scoring_needs(source, texts['evaluation'], settings, models=2)}"
    return needs
