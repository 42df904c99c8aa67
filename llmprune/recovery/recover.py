"""Recover a pruned checkpoint: train its kept weights, write them, and measure what was won."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmprune.devices import PeakWatch, describe_device
from llmprune.errors import RecoveryError
from llmprune.models.checkpoint_source import CheckpointSource, open_checkpoint
from llmprune.progress import Progress, Watcher, ignore
from llmprune.recovery.adapters import (
    add_adapters,
    clear_adapters,
    remove_adapters,
    require_no_correction,
    require_peft,
    save_adapters,
)
from llmprune.recovery.clock import Clock
from llmprune.recovery.finishing import finish
from llmprune.recovery.folder import WORK_NAME, RecoveryFolder
from llmprune.recovery.halves import Halves
from llmprune.recovery.keeping import KeepZeros
from llmprune.recovery.masks import load_masks, masks_to_keep, require_zeros, save_masks, weights_of
from llmprune.recovery.objective import Objective
from llmprune.recovery.options import RecoveryOptions
from llmprune.recovery.plan import RecoveryPlan, disk_needs, make_plan, memory_needs
from llmprune.recovery.reporting import versions
from llmprune.recovery.result import load_whole
from llmprune.recovery.texts import read_evaluation, read_training, require_same_tokens, tokenizer_folder, training_spec
from llmprune.recovery.training import (
    RecoveryTrainer,
    Schedule,
    arguments_for,
    first_half_only,
    same_verbosity,
    trainer_device,
)
from llmprune.storage.companions import ADAPTER_FOLDER, CONFIG_NAME, MASKS_NAME
from llmprune.storage.files import read_json
from llmprune.storage.folders import expanded, require_empty, require_free, require_other, require_space
from llmprune.storage.formats.int8 import Int8Layout
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.storage.packed_config import packed_layouts
from llmprune.storage.report import Report, load_report
from llmprune.stream.guard import MemoryGuard
from llmprune.stream.stream import StreamSettings
from llmprune.text.loading import tokenizer_for
from llmprune.text.openings import Tokenizer
from llmprune.text.tokens import TextSpec, Tokens
from llmprune.timing import Stages
from llmprune.torchrun import follows, processes
from llmprune.units import format_size


@dataclass(frozen=True, slots=True)
class Recovery:
    """What is asked for, opened.

    Attributes:
        names: of the pruned and of the dense model, as they were given; the second may be empty.
        source: the pruned model, in float32.
        teacher: the dense model; None: it is not needed.
        options: of the training.
        device: where it is trained.
        watch: told about every step.
        tokenizer: of both models.
        stages: stopwatch.
    """

    names: tuple[str, str]
    source: CheckpointSource
    teacher: CheckpointSource | None
    options: RecoveryOptions
    device: torch.device
    watch: MemoryGuard
    tokenizer: Tokenizer
    stages: Stages = field(default_factory=Stages)

    @property
    def autocast(self) -> torch.dtype | None:
        """In which dtype matmuls are computed, if not that of the weights, float32."""
        on_gpu = self.device.type == "cuda"
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else None


def recover(
    pruned: str | Path,
    output: str | Path,
    text: TextSpec | str,
    teacher: str | Path | None = None,
    options: RecoveryOptions | Mapping[str, Any] | str | Path | None = None,
    *,
    evaluation: TextSpec | str | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher = ignore,
) -> Report:
    """Train the kept weights of a pruned model, with transformers' Trainer, so that it comes closer to the dense one.

    Every pruned weight stays zero. Weights and moments are float32; on a GPU, products are bfloat16. Under torchrun,
    each process trains a copy of the model on its part of the text (DDP).

    Args:
        pruned: a pruned checkpoint, packed or not, with structures removed or not; never changed.
        output: folder for the result, which is stored and packed as `pruned` is.
        text: what is trained on, or its source; without a number of samples, all of it, at most 8,192 sequences.
        teacher: the dense model; needed unless the loss is "cross-entropy".
        options: how it is trained; or a YAML file with options, such as the recipe.yaml of a recovered checkpoint.
        evaluation: a text on which dense, pruned and recovered model are measured in the end; it is read before.
        device: "auto", "cpu" or "cuda".
        resume: continue an interrupted run in `output` from its last saved state: on a CPU, to the same bytes.
        overwrite: replace an existing checkpoint in `output`.
        watch: told about every step.

    Returns:
        The report; it is also written into `output`.

    Raises:
        RecoveryError: an option is out of range, or pruned weights would not stay zero.
        LlmpruneError: a subclass of it for everything else that a user can fix.

    Example:
        >>> recover("out/pruned", "out/recovered", "text.jsonl", "testbed").header["recovery"]  # doctest: +SKIP
    """
    texts = _spec(text), None if evaluation is None else _spec(evaluation)
    with _opened(pruned, output, texts, teacher, options, device, watch, resume=resume, overwrite=overwrite) as run:
        target = expanded(output)
        tokens = _training_text(run, texts[0])
        measured = _evaluation_text(run, texts[1])
        shape = len(tokens.ids), tokens.ids.shape[1]
        held_back = run.options.kept_back(shape[0])
        run = replace(run, options=replace(run.options, held_back=held_back))
        arguments = arguments_for(
            run.options,
            target / WORK_NAME,
            Schedule.of(run.options, shape[0] - held_back, processes()),
            run.device,
            run.autocast,
        )
        run.watch(Progress("digesting the source"))
        folder = RecoveryFolder(target, _keys(run, tokens, texts[1]))
        with folder.opened(resume=resume, overwrite=overwrite, arguments=arguments):
            run.watch.resumable = True
            needs = memory_needs(run.source, run.teacher, run.options, shape[1])
            run.watch.expected = lambda: f"{format_size(needs)} for weights, gradients, moments, masks and activations"
            if folder.finished:
                run.watch(Progress("nothing to do: the run in this folder is finished"))
                return load_report(target)
            trainer, memory = _train(run, folder, arguments, tokens)
            if not follows():
                finish(run, folder, trainer.state, memory, tokens, measured)
        return load_report(target)


def plan_recovery(
    pruned: str | Path,
    text: TextSpec | str,
    teacher: str | Path | None = None,
    options: RecoveryOptions | Mapping[str, Any] | str | Path | None = None,
    *,
    output: str | Path | None = None,
    evaluation: TextSpec | str | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> RecoveryPlan:
    """Say what `recover` would take, without training; the arguments are its own.

    Without an output folder, or a text to evaluate on, those are not looked at.

    Raises:
        LlmpruneError: as for `recover`.
    """
    spec, measured = _spec(text), None if evaluation is None else _spec(evaluation)
    flags = {"resume": resume, "overwrite": overwrite}
    with _opened(pruned, output, (spec, measured), teacher, options, device, ignore, **flags) as run:
        if measured is not None and measured.source != "self":
            _evaluation_text(run, measured)
        if spec.source == "self":
            fitted = training_spec(spec, run.source, run.device)
            shape = fitted.sequences, fitted.tokens
        else:
            ids = _training_text(run, spec).ids
            shape = len(ids), ids.shape[1]
        return make_plan(run.names, run.source, run.teacher, run.options, shape, run.device, processes())


@contextlib.contextmanager
def _opened(
    pruned: str | Path,
    output: str | Path | None,
    texts: tuple[TextSpec, TextSpec | None],
    teacher: str | Path | None,
    options: RecoveryOptions | Mapping[str, Any] | str | Path | None,
    device: str,
    watch: Watcher,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Recovery]:
    """Check what was asked for, and open both models; nothing is read of their weights."""
    read = RecoveryOptions.read(options)
    if read.kl_weight and teacher is None:
        raise RecoveryError(
            f"the loss {read.loss} without a dense model",
            expected="the model that this one was pruned from",
            fix="pass it as teacher (--teacher), or choose the loss cross-entropy",
        )
    if read.adapter != "none":
        require_peft()
    place = trainer_device(device, RecoveryError)
    guard = MemoryGuard(StreamSettings(place, read.batch_size), ignore if follows() else watch)
    with guard:
        folder = resolve_model(pruned)
        dense = None if teacher is None or not read.kl_weight else resolve_model(teacher)
        if output is not None and not follows():
            target = expanded(output)
            for model in filter(None, (folder, dense)):
                require_other(target, model)
            require_free(target)
            require_empty(target, resume=resume, overwrite=overwrite)
        source = CheckpointSource(folder, torch.float32)
        dense_source = None if dense is None else open_checkpoint(dense, place)
        _require_same_vocabulary(source, dense_source)
        require_same_tokens(folder, dense)
        _require_storable(folder, read)
        require_no_correction(folder)
        if output is not None and not follows():
            purpose = "the recovered checkpoint and the saved states of its training"
            require_space(expanded(output), disk_needs(source, read), resume=resume, purpose=purpose)
        tokenizer = tokenizer_for(filter(None, texts), tokenizer_folder(folder, dense), source.config)
        names = str(pruned), "" if teacher is None else str(teacher)
        yield Recovery(names, source, dense_source, read, place, guard, tokenizer)


def _spec(text: TextSpec | str) -> TextSpec:
    return TextSpec(text) if isinstance(text, str) else text


def _training_text(run: Recovery, text: TextSpec) -> Tokens:
    source = run.teacher or run.source
    with run.stages("text"):
        spec = training_spec(text, run.source, run.device)
        return read_training(spec, source, run.tokenizer, run.device, run.watch)


def _evaluation_text(run: Recovery, text: TextSpec | None) -> Tokens | None:
    """What is measured on in the end, read now: after training, it would be too late to find that it is missing."""
    if text is None:
        return None
    source = run.teacher or run.source
    with run.stages("text"):
        return read_evaluation(text, source, run.tokenizer, run.device, run.watch)


def _require_same_vocabulary(source: CheckpointSource, teacher: CheckpointSource | None) -> None:
    sizes = [one.config.get_text_config().vocab_size for one in (source, teacher) if one is not None]
    if len(set(sizes)) > 1:
        raise RecoveryError(
            f"the pruned model has a vocabulary of {sizes[0]} tokens, and the dense one of {sizes[1]}",
            expected="two models with the same vocabulary",
            fix="pass the model that this one was pruned from",
        )


def _require_storable(folder: Path, options: RecoveryOptions) -> None:
    """Refuse to train weights that are packed in 8 bits: no others than those of its grid can be stored so."""
    layouts = packed_layouts(read_json(folder / CONFIG_NAME))
    if options.adapter != "low-rank" and any(isinstance(layout, Int8Layout) for layout in layouts.values()):
        raise RecoveryError(
            f"{folder} is packed in 8 bits, which do not hold the weights that training makes",
            expected="weights that are not quantised yet, or a correction beside them",
            fix="unpack it (llmprune unpack), or train --adapter low-rank, which leaves the weights as they are",
        )


def _keys(run: Recovery, tokens: Tokens, evaluation: TextSpec | None) -> dict[str, Any]:
    """What the result depends on."""
    return {
        "options": asdict(run.options),
        "tokens": tokens.digest,
        "source": checkpoint_digest(run.source.folder),
        "teacher": None if run.teacher is None else checkpoint_digest(run.teacher.folder),
        "evaluation": None if evaluation is None else asdict(evaluation),
        "version": versions(),
        "device": describe_device(run.device),
        "processes": processes(),
    }


def _train(
    run: Recovery, folder: RecoveryFolder, arguments: Any, tokens: Tokens
) -> tuple[RecoveryTrainer, dict[str, int]]:
    """Train, and leave the best weights in the source's model; returns the trainer, and bytes of memory."""
    options, source, device = run.options, run.source, torch.device(arguments.device)
    held_back = options.held_back or 0
    with PeakWatch(device) as peak:
        run.watch(Progress("loading the models"))
        with run.stages("load"):
            for model in filter(None, (source, run.teacher)):
                load_whole(model, device)
        student = Halves(source.model)
        teacher = None if run.teacher is None else Halves(run.teacher.model)
        for parameter in source.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        if options.checkpointing:
            _enable_checkpointing(source.model)
        masks_file = folder.staging / MASKS_NAME
        if not follows() and not masks_file.exists():
            dense = None if run.teacher is None else run.teacher.model
            save_masks(masks_file, masks_to_keep(source.model, dense))
        folder.wait()
        masks = load_masks(masks_file, source.model)
        objective = Objective(student, teacher, options.kl_weight, run.autocast)
        adapted = options.adapter != "none"
        names = add_adapters(source.decoder, masks, options.rank, options.seed, options.adapter) if adapted else masks
        keeping = KeepZeros(source.model, names)
        with run.stages("train"), first_half_only(objective), same_verbosity():
            trainer = RecoveryTrainer(objective, arguments, tokens, held_back, keeping, options.patience, run.watch)
            trainer.add_callback(Clock(run.stages, Path(arguments.output_dir)))
            with keeping:
                best = trainer.run()
        if options.adapter == "low-rank":
            if best == 0:
                clear_adapters(source.model)
            if not follows():
                save_adapters(source.model, folder.staging / ADAPTER_FOLDER, run.names[0])
            remove_adapters(source.model, merge=False)
        elif adapted:
            remove_adapters(source.model, merge=best != 0)
        elif best == 0:
            load_whole(source, device)
        require_zeros(dict(weights_of(source.model)), masks)
    predicted = memory_needs(source, run.teacher, options, tokens.ids.shape[1])
    memory = {
        "predicted_bytes": predicted,
        "measured_bytes": peak.peak - peak.baseline,
        "baseline_bytes": peak.baseline,
    }
    return trainer, {**memory, "best_step": best}


def _enable_checkpointing(model: Any) -> None:
    """Have decoder layers compute their activations again; transformers has renamed this."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
