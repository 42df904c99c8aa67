"""Prune a checkpoint while it trains: stages of pruning and training, saved after each, and the curve of quality."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmprune.devices import PeakWatch, describe_device
from llmprune.errors import LlmpruneError, TrainingError
from llmprune.models.boundary import is_classifier, read_stock_config
from llmprune.pages import write_report
from llmprune.progress import Progress, Watcher, ignore
from llmprune.recovery.clock import Clock
from llmprune.recovery.folder import WORK_NAME, RecoveryFolder
from llmprune.recovery.reporting import versions
from llmprune.recovery.training import Schedule as Steps
from llmprune.recovery.training import arguments_for, same_verbosity, trainer_device
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import read_json, write_text
from llmprune.storage.folders import RECIPE_NAME, expanded, require_empty, require_free, require_other, require_space
from llmprune.storage.hub import checkpoint_digest, resolve_model
from llmprune.storage.packed_config import packed_layouts
from llmprune.storage.report import Report, load_report
from llmprune.stream.guard import MemoryGuard
from llmprune.stream.stream import StreamSettings
from llmprune.text.tokens import TextSpec
from llmprune.timing import Stages
from llmprune.torchrun import follows, processes
from llmprune.training.card import write_card
from llmprune.training.forecast import TrainingPlan, disk_needs, make_plan, memory_needs
from llmprune.training.recipe import TrainRecipe, load_train_recipe
from llmprune.training.reporting import make_report
from llmprune.training.rules.rule import Loss
from llmprune.training.solving import solver_for
from llmprune.training.sparsifier import Sparsifier, initialised
from llmprune.training.stages import Plan
from llmprune.training.subjects.causal import CausalSubject
from llmprune.training.subjects.classifier import ClassifierSubject
from llmprune.training.subjects.subject import Subject
from llmprune.training.targets import find_targets
from llmprune.training.trainer import StagedTrainer
from llmprune.units import format_size


@dataclass(frozen=True, slots=True)
class Training:
    """What is asked for, opened.

    Attributes:
        name: of the model, as it was given.
        recipe: what is done.
        subject: the model and its text.
        spec: of the text.
        watch: told about every step.
        stages: stopwatch.
    """

    name: str
    recipe: TrainRecipe
    subject: Subject
    spec: TextSpec
    watch: MemoryGuard
    stages: Stages = field(default_factory=Stages)

    @property
    def plan(self) -> Plan:
        """The stages; the text must have been read."""
        trained = len(self.subject.rows) - self.subject.held_back
        return self.recipe.plan(Steps.of(self.recipe.options, trained, processes()).steps)


def train(
    model: str | Path,
    output: str | Path,
    text: TextSpec | str,
    recipe: str | Path | Mapping[str, Any] | TrainRecipe | None = None,
    *,
    overrides: Sequence[str] = (),
    evaluation: TextSpec | str | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    watch: Watcher = ignore,
) -> Report:
    """Prune a model in stages, and train it in each, with transformers' Trainer.

    The model is a causal LM or a sequence classifier. Weights and moments are float32; on a GPU, products are bfloat16.
    Under torchrun, each process trains a copy of the model on its part of the text (DDP).

    Args:
        model: a checkpoint, dense or pruned, or a hub id; never changed.
        output: folder for the result, in the dtype of `model`.
        text: what is trained on, or its source; for a classifier, a .jsonl or .csv file with texts and labels.
        recipe: a bundled recipe's name, a YAML file, YAML text, a mapping or a `TrainRecipe`; None: gradual magnitude
            pruning to 50 %.
        overrides: changes to the recipe, "key.path=value".
        evaluation: a text on which both models are measured in the end; for a classifier, a labelled file.
        device: "auto", "cpu" or "cuda".
        resume: continue an interrupted run in `output` from the end of its last finished stage: on a CPU, to the same
            bytes.
        overwrite: replace an existing checkpoint in `output`.
        watch: told about every step.

    Returns:
        The report; it is also written into `output`. `header["training"]["curve"]` has the quality after each stage.

    Raises:
        TrainingError: the recipe is wrong, or does not fit the model.
        LlmpruneError: a subclass of it for everything else that a user can fix.

    Example:
        >>> train("testbed", "out/trained", "text.jsonl", {"schedule": {"end": 0.8}}).header["training"]["curve"]
        ... # doctest: +SKIP
    """
    flags = {"resume": resume, "overwrite": overwrite}
    with _opened(model, output, text, recipe, overrides, evaluation, device, watch, **flags) as run:
        target = expanded(output)
        with run.stages("text"):
            run.subject.read(run.watch)
        _require_calibration(run)
        plan = run.plan
        arguments = _arguments(run, plan, target)
        run.watch(Progress("digesting the source"))
        folder = RecoveryFolder(target, _keys(run, evaluation), "train")
        with folder.opened(resume=resume, overwrite=overwrite, arguments=arguments):
            run.watch.resumable = True
            needs = memory_needs(run.subject, run.recipe)
            run.watch.expected = lambda: f"{format_size(needs)} for weights, gradients, moments, masks and activations"
            if folder.finished:
                run.watch(Progress("nothing to do: the run in this folder is finished"))
                return load_report(target)
            trainer, memory = _train(run, folder, arguments, plan)
            if not follows():
                _finish(run, folder, trainer, plan, memory)
        return load_report(target)


def plan_training(
    model: str | Path,
    text: TextSpec | str,
    recipe: str | Path | Mapping[str, Any] | TrainRecipe | None = None,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    evaluation: TextSpec | str | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> TrainingPlan:
    """Say what `train` would take, without training; the arguments are its own.

    Without an output folder, or a text to evaluate on, those are not looked at.

    Raises:
        LlmpruneError: as for `train`.
    """
    flags = {"resume": resume, "overwrite": overwrite}
    with _opened(model, output, text, recipe, overrides, evaluation, device, ignore, **flags) as run:
        run.subject.read(run.watch)
        _require_calibration(run)
        return make_plan(run.name, run.subject, run.recipe, run.plan)


@contextlib.contextmanager
def _opened(
    model: str | Path,
    output: str | Path | None,
    text: TextSpec | str,
    recipe: str | Path | Mapping[str, Any] | TrainRecipe | None,
    overrides: Sequence[str],
    evaluation: TextSpec | str | None,
    device: str,
    watch: Watcher,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Training]:
    """Check what was asked for, and open the model; nothing is read of its weights."""
    read = load_train_recipe(recipe, overrides)
    place = trainer_device(device, TrainingError)
    guard = MemoryGuard(StreamSettings(place, read.options.batch_size), ignore if follows() else watch)
    with guard:
        folder = resolve_model(model)
        if output is not None and not follows():
            target = expanded(output)
            require_other(target, folder)
            require_free(target)
            require_empty(target, resume=resume, overwrite=overwrite)
        spec = TextSpec(text) if isinstance(text, str) else text
        measured = TextSpec(evaluation) if isinstance(evaluation, str) else evaluation
        subject = _subject(folder, spec, measured, read, place)
        _require_fitting(subject, read)
        if output is not None and not follows():
            purpose = "the trained checkpoint and the saved states of its training"
            require_space(expanded(output), disk_needs(subject, read), resume=resume, purpose=purpose)
        yield Training(str(model), read, subject, spec, guard)


def _subject(
    folder: Path, text: TextSpec, evaluation: TextSpec | None, recipe: TrainRecipe, device: torch.device
) -> Subject:
    if is_classifier(read_stock_config(folder)):
        measured = None if evaluation is None else evaluation.source
        return ClassifierSubject(folder, text.source, measured, text.length, text.samples, recipe.options, device)
    on_gpu = device.type == "cuda"
    autocast = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else None
    return CausalSubject(folder, text, evaluation, recipe.options, device, autocast)


def _require_fitting(subject: Subject, recipe: TrainRecipe) -> None:
    """Refuse early what the recipe cannot do with this model, or in this many processes."""
    targets = find_targets(subject.model, recipe.include, recipe.exclude)
    if recipe.selection.pattern is not None:
        for target in targets:
            try:
                recipe.selection.pattern.check(target.matrix.shape)
            except LlmpruneError as error:
                raise error.at(target.matrix.name) from error
    if packed_layouts(read_json(subject.folder / CONFIG_NAME)):
        raise TrainingError(
            f"{subject.folder} is packed, and its layouts may not fit other zeros",
            expected="a dense checkpoint",
            fix="unpack it first with `llmprune unpack`, and pack the result",
        )
    if recipe.method is None:
        return
    if not isinstance(subject, CausalSubject):
        raise TrainingError(
            f"the method {recipe.name} on a classifier",
            expected="a causal LM: one-shot methods stream decoder layers",
            fix="choose a rule, such as magnitude or movement",
        )
    if processes() > 1:
        raise TrainingError(
            f"the method {recipe.name} in {processes()} processes",
            expected="one process: every other would prune by itself",
            fix="choose a rule, or run without torchrun",
        )


def _require_calibration(run: Training) -> None:
    """Refuse a text that is too short for the method, which reads it when its first stage begins."""
    tokens, length = run.subject.text.get("tokens_available"), run.subject.token_count
    if run.recipe.method is None or not isinstance(tokens, int):
        return
    if (count := tokens // length) < run.recipe.calibration_samples:
        raise TrainingError(
            f"calibration_samples is {run.recipe.calibration_samples}, and {run.spec.source} has {count} sequences of "
            f"{length} tokens",
            expected=f"as many sequences for the method {run.recipe.name}",
            fix="lower calibration_samples, add text, or set a shorter length",
        )


def _arguments(run: Training, plan: Plan, target: Path) -> Any:
    subject = run.subject
    autocast = torch.bfloat16 if subject.device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    steps = Steps(plan.steps, plan.steps)
    options = run.recipe.options.with_held_back(subject.held_back)
    arguments = arguments_for(options, target / WORK_NAME, steps, subject.device, autocast)
    arguments.metric_for_best_model = None  # the last stage is the result
    return arguments


def _keys(run: Training, evaluation: TextSpec | str | None) -> dict[str, Any]:
    """What the result depends on."""
    recipe = run.recipe.to_dict()
    recipe.pop("description")
    return {
        "recipe": recipe,
        "rows": run.subject.digest,
        "source": checkpoint_digest(run.subject.folder),
        "evaluation": None if evaluation is None else str(evaluation),
        "version": versions(),
        "device": describe_device(run.subject.device),
        "processes": processes(),
    }


def _train(run: Training, folder: RecoveryFolder, arguments: Any, plan: Plan) -> tuple[StagedTrainer, dict[str, int]]:
    """Train, and leave the result in the subject's model; returns the trainer, and bytes of memory."""
    subject, recipe, device = run.subject, run.recipe, torch.device(arguments.device)
    with PeakWatch(device) as peak:
        run.watch(Progress("loading the model"))
        with run.stages("load"):
            subject.load(device, teacher=bool(recipe.options.kl_weight))
        _prepare(subject, recipe)
        solve = None
        if recipe.method is not None:
            assert isinstance(subject, CausalSubject)
            solve = solver_for(recipe, subject, run.spec, run.watch)
        sparsifier = Sparsifier(
            subject.model, find_targets(subject.model, recipe.include, recipe.exclude), recipe.rule, plan,
            recipe.selection, loss=_early_loss(subject), solve=solve, seed=recipe.options.seed,
        )  # fmt: skip
        with run.stages("train"), subject.session(), same_verbosity():
            trainer = StagedTrainer(subject, arguments, sparsifier, recipe.cycle, run.watch)
            trainer.add_callback(Clock(run.stages, Path(arguments.output_dir)))
            trainer.run()
        folder.wait()
    memory = {
        "predicted_bytes": memory_needs(subject, recipe),
        "measured_bytes": peak.peak - peak.baseline,
        "baseline_bytes": peak.baseline,
    }
    return trainer, memory


def _prepare(subject: Subject, recipe: TrainRecipe) -> None:
    for parameter in subject.model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if recipe.from_scratch:
        fresh = initialised(subject.model, recipe.options.seed)
        with torch.no_grad():
            for name, parameter in subject.model.named_parameters():
                parameter.copy_(fresh[name])
    if recipe.options.checkpointing:
        model: Any = subject.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _early_loss(subject: Subject) -> Loss:
    """The loss of the first rows, in evaluation mode, for rules that choose before training."""
    rows = subject.rows[: min(32, len(subject.rows) - subject.held_back)]

    def loss(temperature: float) -> torch.Tensor:
        subject.model.eval()
        return subject.early_loss(rows, temperature)

    return loss


def _finish(run: Training, folder: RecoveryFolder, trainer: StagedTrainer, plan: Plan, memory: dict[str, int]) -> None:
    """Write the result, measure it, and put it in its place."""
    with run.stages("write"):
        run.subject.write(folder.staging, run.watch)
    measured = None
    if run.subject.evaluates:
        with run.stages("evaluation"):
            measured = run.subject.evaluate(folder.staging, run.watch)
    report = make_report(run, folder.keys, trainer.state, plan, memory, folder.staging, measured)
    report.save(folder.staging)
    write_text(folder.staging / RECIPE_NAME, run.recipe.to_yaml())
    write_report(folder.staging)
    write_card(folder.staging, run.recipe, report)
    folder.close()
