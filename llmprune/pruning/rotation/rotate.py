"""Rotate a checkpoint: fold its norms, find a rotation, absorb it, and check that nothing has changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmprune.devices import describe_device, return_freed_memory
from llmprune.errors import CheckpointError, RecipeError
from llmprune.models.checkpoint_source import CheckpointSource, open_checkpoint, positive_zeros
from llmprune.models.patched_config import patched_config
from llmprune.precision import float32_products
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.context import versions
from llmprune.pruning.rotation.check import compare_logits
from llmprune.pruning.rotation.report import RotationReport, load_rotation_report
from llmprune.pruning.rotation.terms import Terms
from llmprune.recipe.rotation import RotationOptions
from llmprune.rotation.search import Rotation, hadamard_rotation, learn, random_rotation
from llmprune.storage.files import read_header, read_json, write_shard
from llmprune.storage.folders import expanded, locked, require_empty, require_free, require_other, require_space
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.storage.output import OutputFolder
from llmprune.storage.packed_config import packed_layouts
from llmprune.stream.guard import MemoryGuard, sampling_needs
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.structures.residual import Residual, find_residual
from llmprune.structures.turning import Turned
from llmprune.text.loading import load_texts, model_positions, tokenizer_for
from llmprune.text.tokens import TextSpec, Tokens
from llmprune.timing import Stages

# The rotation itself, kept until the result is whole, so that an interrupted run goes on with the same one. Its name
# begins with a dot: it is no part of the result.
_KEPT = ".rotation.safetensors"


def rotate(
    model: str | Path,
    output: str | Path,
    rotation: RotationOptions | Mapping[str, Any] | None = None,
    calibration: TextSpec | None = None,
    settings: StreamSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher = ignore,
) -> RotationReport:
    """Write a checkpoint that computes the same, but whose weights can be pruned with less loss.

    An orthogonal rotation of the residual stream, and one of the values of each KV head, are absorbed into the weights,
    so the result is an ordinary checkpoint of the same architecture.

    Args:
        model: a hub id, a local checkpoint folder or "testbed", which is read layer by layer and never changed.
        output: folder for the rotated checkpoint.
        rotation: which rotation, and how it is found.
        calibration: the text on which statistics are collected and logits compared; default: self-generated.
        settings: device, batch size and memory; default: the CPU.
        resume: continue an interrupted run in `output`.
        overwrite: replace an existing checkpoint in `output`.
        watch: told about every step.

    Returns:
        The report; it is also written into `output`, as rotation.json.

    Raises:
        ModelError: a rotation would change what this architecture computes, or its embeddings are tied.
        NumericsError: the logits of the result differ by more than rounding.
        LlmpruneError: a subclass of it for everything else that a user can fix.

    Example:
        >>> rotate("testbed", "out/rotated", {"steps": 100}).logits.kl_divergence  # doctest: +SKIP
        0.0002
    """
    options = read_options(rotation)
    settings = replace(settings or StreamSettings(), held_back=0)
    guard = MemoryGuard(settings, watch)
    with guard:
        return rotate_checkpoint(
            str(model),
            resolve_model(model),
            expanded(output),
            Job(options, calibration or TextSpec(), settings, guard),
            resume=resume,
            overwrite=overwrite,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked for.

    Attributes:
        options: of the rotation.
        calibration: the text.
        settings: of every stream.
        watch: told about every step.
        decoder_layers: dotted name of the decoder layers; None: they are searched for.
        stages: stopwatch.
    """

    options: RotationOptions
    calibration: TextSpec
    settings: StreamSettings
    watch: MemoryGuard
    decoder_layers: str | None = None
    stages: Stages = field(default_factory=Stages)


def read_options(rotation: RotationOptions | Mapping[str, Any] | None) -> RotationOptions:
    """Options from plain data.

    Raises:
        RecipeError: a key is unknown, or a value out of range.
    """
    if isinstance(rotation, RotationOptions):
        return rotation
    try:
        return RotationOptions.model_validate(dict(rotation or {}), strict=True)
    except ValueError as error:
        raise RecipeError(
            f"rotation: {error}", expected=f"the keys {', '.join(RotationOptions.model_fields)}"
        ) from error


def open_rotatable(folder: Path, job: Job) -> tuple[CheckpointSource, Residual]:
    """Open a checkpoint in float32, and find its residual stream; no weights are read.

    Raises:
        ModelError: a rotation would not be exact.
        CheckpointError: it is packed: a rotation would fill its zeros.
    """
    if packed_layouts(read_json(folder / "config.json")):
        raise CheckpointError(
            f"{folder} is packed, and a rotation would fill its zeros",
            expected="a dense checkpoint",
            fix="rotate the checkpoint that it was pruned from, and prune again",
        )
    source = open_checkpoint(folder, job.settings.device, "float32", job.decoder_layers)
    return source, find_residual(source, untie=job.options.untie)


def untied_bytes(source: CheckpointSource, residual: Residual) -> int:
    """By how many bytes a checkpoint grows because its LM head gets weights of its own."""
    if residual.tied is None:
        return 0
    shape = source.model.get_input_embeddings().weight.shape
    names = [name for name, dims in residual.places.items() if source.model.get_parameter(name).shape == shape]
    return next(t.nbytes for key, t in source.stored.items() if not set(names).isdisjoint(source.targets[key]))


def rotate_checkpoint(
    name: str, folder: Path, output: Path, job: Job, *, resume: bool = False, overwrite: bool = False
) -> RotationReport:
    """Rotate a checkpoint folder into another one.

    Args:
        name: of the model, as the user gave it.
        folder: the checkpoint.
        output: where the rotated checkpoint is written.
        job: what is asked for.
        resume: as for `rotate`.
        overwrite: as for `rotate`.

    Raises:
        LlmpruneError: as for `rotate`.
    """
    require_other(output, folder)
    require_free(output)
    require_empty(output, resume=resume, overwrite=overwrite)
    source, residual = open_rotatable(folder, job)
    more = untied_bytes(source, residual)
    require_space(output, sum(stored.nbytes for stored in source.stored.values()) + more, resume=resume)
    tokens = _text(source, folder, job)
    keys: dict[str, Any] = {
        "rotation": job.options.model_dump(mode="json"),
        "tokens": tokens.digest,
        "source": checkpoint_digest(folder),
        "version": versions(),
        "device": describe_device(job.settings.device),
    }
    with locked(output):
        target = OutputFolder.open(output, keys, resume=resume, overwrite=overwrite)
        job.watch.resumable = True
        if target.complete:
            return load_rotation_report(output)
        rotation, losses = _rotation(target, source, residual, tokens, job)
        _write(target, Turned(source, residual, rotation), job)
        with job.stages("check"):
            rotated = open_checkpoint(target.path, job.settings.device, "float32", job.decoder_layers)
            logits = compare_logits(source, rotated, tokens.ids, job.settings, job.watch)
        report = RotationReport(
            name,
            keys["rotation"],
            residual.size,
            len(source.layers),
            len(rotation.heads),
            more,
            (losses[0], min(losses)) if losses else None,
            losses.index(min(losses)) if losses else None,
            logits,
            tokens.description | {"digest": tokens.digest},
            dict(job.stages.seconds),
            {key: keys[key] for key in ("version", "device", "source")},
        )
        report.save(target.path)
        target.close()
        return report


def _text(source: CheckpointSource, folder: Path, job: Job) -> Tokens:
    spec = job.calibration.fitted(model_positions(source.config), job.settings.device.type)
    tokenizer = tokenizer_for([spec], folder, source.config)
    job.watch(Progress("calibration text", step=spec.summary))
    if spec.source == "self":
        job.watch.expected = lambda: sampling_needs(source)
    with job.stages("text"):
        return load_texts({"calibration": spec}, source, tokenizer, job.settings.device, job.watch)["calibration"]


def _rotation(
    target: OutputFolder, source: CheckpointSource, residual: Residual, tokens: Tokens, job: Job
) -> tuple[Rotation, list[float]]:
    """The rotation of this run, found now or before it was interrupted, and the losses of its search."""
    file = target.path / _KEPT
    if file.exists():
        tensors = load_file(file)
        heads = {int(key): tensor for key, tensor in tensors.items() if key.isdigit()}
        return Rotation(tensors["stream"], heads), tensors["losses"].tolist()
    rotation, losses = _find(source, residual, tokens, job)
    kept = {str(layer): matrix for layer, matrix in rotation.heads.items()}
    write_shard(file, {"stream": rotation.stream, "losses": torch.tensor(losses, dtype=torch.float64), **kept})
    return rotation, losses


def _find(source: CheckpointSource, residual: Residual, tokens: Tokens, job: Job) -> tuple[Rotation, list[float]]:
    options, device = job.options, job.settings.device
    heads = {layer: (len(values.rows), values.rows.shape[1]) for layer, values in residual.values.items()}
    if options.kind != "learned":
        draw = random_rotation if options.kind == "random" else hadamard_rotation
        return draw(residual.size, heads, options.seed), []
    with job.stages("statistics"):
        terms = Terms(residual, Stream(source, tokens.ids, job.settings, job.stages), job.watch)
        return_freed_memory()

    def tell(step: int, loss: float) -> None:
        job.watch(Progress("rotation", step, options.steps, f"loss {loss:.6g}", unit="step"))

    with job.stages("search"), float32_products("ieee"):
        found = learn(
            residual.size, heads, len(source.layers), terms.loss, steps=options.steps, device=device, watch=tell
        )
    return found.rotation, list(found.losses)


def _write(target: OutputFolder, turned: Turned, job: Job) -> None:
    """Write the layers that are not written yet, and everything else."""
    source, layers = turned.source, len(turned.source.layers)

    def shard(number: int) -> str:
        return f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"

    with job.stages("write"):
        for index in range(layers):
            job.watch(Progress("writing", index, layers))
            if source.layer_name(index) in target.layers:
                continue
            source.load_layer(index, job.settings.device)
            try:
                target.commit(source.layer_name(index), shard(index + 1), turned.layer_tensors(index), [], {})
            finally:
                source.free_layer(index)
                return_freed_memory()
        ends = {key: positive_zeros(tensor) for key, tensor in turned.end_tensors().items()}
        target.commit_ends(shard(0), ends)
        shards = [shard(0), *(layer["shard"] for layer in target.layers.values())]
        headers = {name: read_header(target.path / name) for name in shards}
        config = patched_config(source, turned.residual.config) if turned.residual.tied else None
        for left_out in target.finish(source.folder, headers, config):
            job.watch(Progress(left_out))
        job.watch(Progress("writing", layers, layers))
