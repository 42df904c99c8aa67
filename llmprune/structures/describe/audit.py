"""Check that config.json and the tensors of a checkpoint match, by reading all of it."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.errors import ModelError
from llmprune.models.boundary import one_line
from llmprune.models.decoder import Decoder
from llmprune.models.source import StoredSource
from llmprune.models.uneven import UNBUILDABLE, build_decoder
from llmprune.structures.describe.candidates import integers
from llmprune.structures.find.tracing import TracedForward, eagerly


def audit_checkpoint(source: StoredSource) -> None:
    """Check the config and the tensors of a checkpoint against each other by loading it, one layer at a time.

    Raises:
        ModelError: they do not match; says what is wrong.
        CheckpointError: a tensor is missing, or its shape is not the one in the config.
    """
    cpu = torch.device("cpu")
    shapes: dict[str, list[int]] = {}

    def note() -> None:
        resident = (pair for pair in source.model.state_dict().items() if not pair[1].is_meta)
        shapes.update((name, list(tensor.shape)) for name, tensor in resident)

    source.load_ends(cpu)
    note()
    source.free_ends()
    for index in range(len(source.layers)):
        source.load_layer(index, cpu)
        note()
        source.free_layer(index)
    if problems := audit(source.config, shapes, source.layers_path):
        raise ModelError(
            f"{source.folder}: config.json and the tensors do not match: {'; '.join(problems[:3])}",
            expected="a checkpoint that loads",
            fix="report this as a bug, with the model's id and the recipe",
        )


def audit(config: PretrainedConfig, shapes: Mapping[str, Sequence[int]], path: str | None = None) -> list[str]:
    """Check a config and the tensors of a checkpoint against each other.

    Args:
        config: of the checkpoint, with or without `per_layer_config`.
        shapes: the model's name for each tensor -> its shape.
        path: dotted name of the decoder layers; None: they are searched for.

    Returns:
        The problems, one line each; empty if there are none.
    """
    problems = list(contradictory_counts(config))
    try:
        decoder = build_decoder(config, path=path)
    except (*UNBUILDABLE, ModelError) as error:
        return [*problems, f"the model cannot be built: {one_line(error)}"]
    state = decoder.model.state_dict()
    copies = {name for names in _tied(decoder.model) for name in names if any(other in shapes for other in names)}
    problems += [f"{name} is missing" for name in state if name not in shapes and name not in copies]
    problems += [f"{name} is not part of the model" for name in shapes if name not in state]
    for name in state.keys() & shapes.keys():
        if tuple(state[name].shape) != tuple(shapes[name]):
            problems.append(f"{name} has shape {list(shapes[name])}, but the config says {list(state[name].shape)}")
    if not problems:
        problems += run_failures(decoder)
    return sorted(problems)


def contradictory_counts(config: PretrainedConfig) -> Iterator[str]:
    """Contradictory counts in the config."""
    text = config.get_text_config(decoder=True)
    values = {path[-1]: value for path, value in integers(config, least=1).items()}
    experts = max((v for k, v in values.items() if "experts" in k and "per_tok" not in k), default=None)
    chosen = max((v for k, v in values.items() if "experts_per_tok" in k or k == "moe_top_k"), default=0)
    if experts is not None and chosen > experts:
        yield f"{chosen} of {experts} experts are to be selected for each token"
    if experts is not None and experts % values.get("n_group", 1):
        yield f"{experts} experts cannot be split into {values['n_group']} groups"
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(text, name, None)
        if isinstance(kinds, list) and len(kinds) != text.num_hidden_layers:
            yield f"{name} has {len(kinds)} entries for {text.num_hidden_layers} layers"


def _tied(model: PreTrainedModel) -> list[set[str]]:
    """Sets of names that refer to the same parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [together for together in names.values() if len(together) > 1]


def run_failures(decoder: Decoder) -> Iterator[str]:
    """Why the model's own code fails with these shapes, if it does: head sizes, rotary and cache dimensions."""
    try:
        with torch.enable_grad(), eagerly(decoder.model):
            TracedForward(decoder, frozen=False).each(lambda index, trace: None)
    except UNBUILDABLE as error:
        yield f"the model does not run: {one_line(error)}"
