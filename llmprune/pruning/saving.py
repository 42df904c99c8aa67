"""Save models that are in memory."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmprune.errors import PatternError
from llmprune.models.checkpoint_source import CheckpointSource, positive_zeros
from llmprune.models.skeleton import quiet_transformers
from llmprune.models.uneven import put_per_layer, read_per_layer
from llmprune.pages import write_report
from llmprune.pruning.card import write_card
from llmprune.pruning.packing import pack
from llmprune.recipe.recipe import Recipe
from llmprune.serving.quantizer import keep_record
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.config_files import write_config
from llmprune.storage.exchange import replacing
from llmprune.storage.files import read_json, write_text
from llmprune.storage.folders import RECIPE_NAME, require_empty, writing_to
from llmprune.storage.report import Report
from llmprune.text.openings import Tokenizer


def save_pruned(
    model: PreTrainedModel, tokenizer: Tokenizer, output: Path, recipe: Recipe, report: Report, *, overwrite: bool
) -> bool:
    """Save a model that was pruned in memory.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        output: the folder.
        recipe: as it was run.
        report: of the run.
        overwrite: replace an existing checkpoint in `output`.

    Returns:
        Whether it is stored as the recipe says: False if its format is a packed one and nothing was packed.

    Raises:
        ResumeError: the folder is not empty, or another run is writing into it.
        CheckpointError: it cannot be written.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            positive_zeros(parameter)
    require_empty(output, resume=None, overwrite=overwrite)
    with writing_to(output), replacing(output) as new:
        folder = new / "dense"
        save_dense(model, tokenizer, folder)
        write_text(folder / RECIPE_NAME, recipe.to_yaml())
        report.save(folder)
        as_wanted = recipe.format == "dense"
        if recipe.format != "dense":
            # If packing makes nothing smaller, all matrices stay dense, as when a checkpoint is pruned.
            with contextlib.suppress(PatternError):
                folder = pack(folder, new / "packed", recipe.format).folder
                as_wanted = True
        write_card(folder, report.header["model"], recipe, report)
        write_report(folder)
        for file in folder.iterdir():
            file.replace(new / file.name)
        for emptied in ("dense", "packed"):
            shutil.rmtree(new / emptied, ignore_errors=True)
    return as_wanted


def save_dense(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model and its tokenizer into a new folder."""
    with quiet_transformers():
        model.save_pretrained(folder)
    # Any callable is accepted as a tokenizer, and a model may have none.
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)  # safetensors creates private files
    write_config(folder, read_json(folder / CONFIG_NAME))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model in evaluation mode: dropout would add noise to the calibration statistics."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def take_over(model: PreTrainedModel, folder: Path) -> None:
    """Turn a model in memory into that of a checkpoint, by replacing its modules and its config.

    Args:
        model: keeps its dtype, device, training mode, and which parameters require gradients.
        folder: the checkpoint, whose model has modules of the same classes in other sizes.
    """
    device = next(model.parameters()).device
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    source = CheckpointSource(folder, model.dtype)
    source.load_ends(device)
    for index in range(len(source.layers)):
        source.load_layer(index, device)
    attention, experts = model.config._attn_implementation, model.get_experts_implementation()
    small = source.model.train(model.training)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(gradients.get(name, True))
    for name, child in small.named_children():
        setattr(model, name, child)
    model.config = small.config
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    if per_layer := read_per_layer(source.config):
        # As after loading: the layers differ in size, and a saved config has to record that.
        put_per_layer(model.config, per_layer)
        keep_record(model)
