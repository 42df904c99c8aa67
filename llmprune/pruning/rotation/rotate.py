"""Rotate a checkpoint: fold its norms, find a rotation, absorb it, and check that nothing has changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmprune.devices import describe_device, return_freed_memory
from llmprune.errors import CheckpointError, PatternError, ResumeError
from llmprune.models.checkpoint_source import CheckpointSource, open_checkpoint, positive_zeros, zero_share
from llmprune.models.decoder import prunable_matrices
from llmprune.models.patched_config import patched_config
from llmprune.patterns import NM
from llmprune.precision import float32_products
from llmprune.progress import Progress, Watcher, ignore
from llmprune.pruning.context import versions
from llmprune.pruning.rotation.check import compare_logits
from llmprune.pruning.rotation.report import RotationReport, load_rotation_report
from llmprune.pruning.rotation.terms import PatternOf, Terms, fitting
from llmprune.recipe.document import Document
from llmprune.recipe.messages import explain
from llmprune.recipe.rotation import RotationOptions
from llmprune.rotation.search import Rotation, hadamard_rotation, learn, random_rotation
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import read_header, read_json, write_shard
from llmprune.storage.folders import expanded, locked, require_empty, require_free, require_other, require_space
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.storage.output import OutputFolder
from llmprune.storage.packed_config import packed_layouts
from llmprune.storage.source_watch import SourceWatch
from llmprune.stream.guard import MemoryGuard, sampling_needs
from llmprune.stream.stream import Stream, StreamSettings
from llmprune.structures.residual import Residual, embedding_bytes, find_residual
from llmprune.structures.turning import Turned
from llmprune.text.loading import load_texts, model_positions, tokenizer_for
from llmprune.text.tokens import TextSpec, Tokens
from llmprune.timing import Stages

# The rotation itself, kept until the result is whole, so that an interrupted run goes on with the same one. Its name
# begins with a dot: it is no part of the result.
_KEPT = ".rotation.safetensors"

# What a checkpoint is prepared for if nothing is said: the pattern of the recipes best-fast and best.
_PATTERN = NM(2, 4)

# Zeros beyond this share of a checkpoint's matrices were pruned: trained weights are hardly ever exactly 0.
_MOST_ZEROS = 0.05


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
        CheckpointError: the model is packed or pruned, changes while it is read, or the result cannot be written.
        NumericsError: the logits of the result differ by more than rounding.
        LlmpruneError: a subclass of it for everything else that a user can fix.

    Example:
        >>> rotate("testbed", "out/rotated", {"steps": 100}).logits.kl_divergence  # doctest: +SKIP
        0.0002
    """
    settings = replace(settings or StreamSettings(), held_back=0)
    job = lone_job(rotation, settings, watch)
    with job.watch:
        folder, target = resolve_model(model), expanded(output)
        require_other(target, folder)
        require_free(target)
        require_empty(target, resume=resume, overwrite=overwrite)
        rotatable = open_rotatable(folder, job)
        require_space(target, rotatable.nbytes, resume=resume)
        tokens = _text(rotatable.source, folder, calibration or TextSpec(), job)
        return rotate_checkpoint(str(model), rotatable, tokens, target, job, resume=resume, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class RotationJob:
    """What is asked for.

    Attributes:
        options: of the rotation.
        settings: of every stream, with nothing held back.
        watch: told about every step.
        patterns: the zeros that the matrices will get.
        decoder_layers: dotted name of the decoder layers; None: they are searched for.
        stages: stopwatch.
    """

    options: RotationOptions
    settings: StreamSettings
    watch: MemoryGuard
    patterns: PatternOf
    decoder_layers: str | None = None
    stages: Stages = field(default_factory=Stages)


@dataclass(frozen=True, slots=True, eq=False)
class Rotatable:
    """A checkpoint that can be rotated.

    Attributes:
        source: the checkpoint, in float32.
        residual: its residual stream.
        untied_bytes: by how many bytes it grows because its LM head gets weights of its own.
        unchanged: notices when its files change.
    """

    source: CheckpointSource
    residual: Residual
    untied_bytes: int
    unchanged: SourceWatch

    @property
    def nbytes(self) -> int:
        """Size of the rotated checkpoint."""
        return sum(stored.nbytes for stored in self.source.stored.values()) + self.untied_bytes


def read_options(rotation: RotationOptions | Mapping[str, Any] | None) -> RotationOptions:
    """Options from plain data.

    Raises:
        RecipeError: a key is unknown, or a value out of range.
    """
    if isinstance(rotation, RotationOptions):
        return rotation
    try:
        return RotationOptions.model_validate(dict(rotation or {}), strict=True)
    except ValidationError as error:
        # In the terms of a recipe, without the name of one.
        cause, refused = explain(error, Document({}, "rotation"), lambda path: list(RotationOptions.model_fields))
        raise refused from cause


def lone_job(
    rotation: RotationOptions | Mapping[str, Any] | None, settings: StreamSettings, watch: Watcher = ignore
) -> RotationJob:
    """What is asked for where there is no recipe: every matrix will get the same zeros.

    Raises:
        RecipeError: a key is unknown, or a value out of range.
    """
    options = read_options(rotation)
    pattern = (options.pattern or _PATTERN).compared("row")
    return RotationJob(options, settings, MemoryGuard(settings, watch), lambda name: pattern)


def open_rotatable(folder: Path, job: RotationJob) -> Rotatable:
    """Open a checkpoint in float32, and find its residual stream; of each matrix, a few rows are read.

    Raises:
        ModelError: a rotation would not be exact.
        CheckpointError: it is packed or pruned: a rotation would fill its zeros.
    """
    if packed_layouts(read_json(folder / CONFIG_NAME)):
        raise _filled(f"{folder} is packed")
    unchanged = SourceWatch(folder)
    source = open_checkpoint(folder, job.settings.device, "float32", job.decoder_layers)
    residual = find_residual(source, untie=job.options.untie)
    if job.options.kind == "learned":
        _require_pruned(source, job.patterns)
    if (share := zero_share(source)) > _MOST_ZEROS:
        raise _filled(f"{folder} is pruned: {share:.1%} of the weights in its decoder layers are 0")
    return Rotatable(source, residual, 0 if residual.tied is None else embedding_bytes(source), unchanged)


def _require_pruned(source: CheckpointSource, patterns: PatternOf) -> None:
    matrices = [
        m for index, layer in enumerate(source.layers) for m in prunable_matrices(layer, source.layer_name(index))
    ]
    if any(fitting(patterns, matrix) for matrix in matrices):
        return
    asked = sorted({str(pattern) for matrix in matrices if (pattern := patterns(matrix.name)) is not None})
    raise PatternError(
        f"a rotation is learned for the zeros of a pattern, and {' or '.join(asked) or 'none'} fits no matrix",
        expected="a pattern that fits at least one of them",
        fix="name another pattern, or rotate by kind: hadamard, which prepares for none",
    )


def _filled(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, and a rotation would fill its zeros",
        expected="a dense checkpoint",
        fix="rotate the checkpoint that it was pruned from, and prune again; what is pruned already needs no rotation",
    )


def rotate_checkpoint(
    name: str,
    rotatable: Rotatable,
    tokens: Tokens,
    output: Path,
    job: RotationJob,
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: int = 1,
) -> RotationReport:
    """Rotate a checkpoint into another folder.

    Args:
        name: of the model, as the user gave it.
        rotatable: the checkpoint.
        tokens: the calibration text.
        output: where the rotated checkpoint is written.
        job: what is asked for.
        resume: as for `rotate`.
        overwrite: as for `rotate`.
        processes: how many share the run of which this is a part, and so how many threads each has.

    Raises:
        LlmpruneError: as for `rotate`.
    """
    source, residual = rotatable.source, rotatable.residual
    keys: dict[str, Any] = {
        "rotation": job.options.model_dump(mode="json"),
        "tokens": tokens.digest,
        "source": checkpoint_digest(source.folder),
        "version": versions(),
        "device": describe_device(job.settings.device),
    }
    with locked(output):
        target = OutputFolder.open(
            output, keys, resume=resume, overwrite=overwrite, source=rotatable.unchanged, processes=processes
        )
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
            rotatable.untied_bytes,
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


def _text(source: CheckpointSource, folder: Path, spec: TextSpec, job: RotationJob) -> Tokens:
    spec = spec.fitted(model_positions(source.config), job.settings.device.type)
    tokenizer = tokenizer_for([spec], folder, source.config)
    job.watch(Progress("calibration text", step=spec.summary))
    if spec.source == "self":
        job.watch.expected = lambda: sampling_needs(source)
    with job.stages("text"):
        return load_texts({"calibration": spec}, source, tokenizer, job.settings.device, job.watch)["calibration"]


def _rotation(
    target: OutputFolder, source: CheckpointSource, residual: Residual, tokens: Tokens, job: RotationJob
) -> tuple[Rotation, list[float]]:
    """The rotation of this run, found now or before it was interrupted, and the losses of its search."""
    file = target.path / _KEPT
    if file.exists():
        try:
            tensors = load_file(file)
            heads = {int(key): tensor for key, tensor in tensors.items() if key.isdigit()}
            return Rotation(tensors["stream"], heads), tensors["losses"].tolist()
        except (OSError, SafetensorError, KeyError) as error:
            raise ResumeError(
                f"{file} is damaged: {error}",
                expected="the rotation of the interrupted run",
                fix="start again with --overwrite",
            ) from error
    rotation, losses = _find(source, residual, tokens, job)
    kept = {str(layer): matrix for layer, matrix in rotation.heads.items()}
    write_shard(file, {"stream": rotation.stream, "losses": torch.tensor(losses, dtype=torch.float64), **kept})
    return rotation, losses


def _find(
    source: CheckpointSource, residual: Residual, tokens: Tokens, job: RotationJob
) -> tuple[Rotation, list[float]]:
    options, device, heads = job.options, job.settings.device, residual.head_sizes
    if options.kind != "learned":
        draw = random_rotation if options.kind == "random" else hadamard_rotation
        return draw(residual.size, heads, options.seed), []
    with job.stages("statistics"):
        terms = Terms(residual, Stream(source, tokens.ids, job.settings, job.stages), job.patterns, job.watch)
        return_freed_memory()

    def tell(step: int, loss: float) -> None:
        job.watch(Progress("rotation", step, options.steps, f"loss {loss:.6g}", unit="step"))

    with job.stages("search"), float32_products("ieee"):
        found = learn(
            residual.size, heads, len(source.layers), terms.loss, steps=options.steps, device=device, watch=tell
        )
    return found.rotation, list(found.losses)


def _write(target: OutputFolder, turned: Turned, job: RotationJob) -> None:
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
        shards = [shard(0), *(layer.shard for layer in target.layers.values())]
        headers = {name: read_header(target.path / name) for name in shards}
        config = patched_config(source, turned.residual.config) if turned.residual.tied else None
        for left_out in target.finish(source.folder, headers, config):
            job.watch(Progress(left_out))
        job.watch(Progress("writing", layers, layers))
