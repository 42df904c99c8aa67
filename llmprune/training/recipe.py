"""What `llmprune train` does, as YAML for people: the rule or the solver, the stages, and the training between them.

rule: movement
schedule: {kind: cubic, stages: 10, end: 0.9, every: 100}
training: {learning_rate: 3e-5, batch_size: 16}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from llmprune.errors import LlmpruneError, TrainingError
from llmprune.recipe.bundled import open_recipe
from llmprune.recipe.document import Document, RecipeDumper, one_of, override, parse_document, tell_changes
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.recovery.options import RecoveryOptions
from llmprune.training.reading import WHOLE, read_keys, read_rule, read_schedule, read_selection
from llmprune.training.rules import RULES, GradualMagnitude, Rule, Schedule, Selection
from llmprune.training.stages import Plan

Cycle = Literal["stage", "run"]

# Options of a recovery that mean nothing here: the last stage is the result, and each stage is scored.
_UNUSED = ("evaluations", "patience", "adapter", "rank")


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """A training with stages, checked.

    Attributes:
        description: one line for people.
        rule: by which masks are chosen; with a method, only by which zeros are kept.
        rule_name: as it was written; empty with a method.
        method: a one-shot method of `llmprune prune` in place of a rule, as it was written; None: a rule.
        selection: which weights are compared.
        schedule: the stages.
        include: shell globs of the names of matrices that are pruned.
        exclude: globs of included matrices that stay dense.
        calibration_samples: sequences of the training text that a method reads.
        from_scratch: the weights are initialised anew first.
        cycle: over which the learning rate rises and falls: each "stage", or the whole "run".
        options: of the training: loss, learning rate, batches.
    """

    description: str
    rule: Rule
    rule_name: str
    method: Any
    selection: Selection
    schedule: Schedule
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    calibration_samples: int
    from_scratch: bool
    cycle: Cycle
    options: RecoveryOptions

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; what the result depends on, and the description."""
        options = {key: value for key, value in asdict(self.options).items() if key not in _UNUSED}
        pattern = self.selection.pattern
        chosen = {"method": self.method} if self.method else {"rule": {self.rule_name: asdict(self.rule)}}  # type: ignore[call-overload]
        return {
            "description": self.description,
            **chosen,
            "pattern": None if pattern is None else str(pattern),
            **({} if self.method or pattern else {"scope": self.selection.scope}),
            "schedule": asdict(self.schedule),
            "include": list(self.include),
            "exclude": list(self.exclude),
            **({"calibration_samples": self.calibration_samples} if self.method else {}),
            "from_scratch": self.from_scratch,
            "training": {**options, "cycle": self.cycle},
        }

    def to_yaml(self) -> str:
        """As YAML that `load_train_recipe` reads back to an equal recipe."""
        return yaml.dump(_written(self), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)

    @property
    def name(self) -> str:
        """The rule, or the method, in a word."""
        return self.rule_name or (self.method if isinstance(self.method, str) else json.dumps(self.method))

    def plan(self, every: int) -> Plan:
        """The stages, with so many optimizer steps each unless the schedule says.

        Raises:
            TrainingError: the rule rewinds too far.
        """
        return Plan.of(self.schedule, self.rule, self.schedule.every or every)

    def pruning(self, sparsity: float, source: str, length: int, device: str) -> Recipe:
        """The recipe by which a method prunes to a sparsity.

        Args:
            sparsity: of the stage.
            source: of the calibration text.
            length: of its sequences in tokens.
            device: where it runs.

        Raises:
            RecipeError: the method is unknown or does not fit the pattern.
        """
        pattern = str(sparsity) if self.selection.pattern is None else str(self.selection.at(sparsity))
        text = {"source": source, "samples": self.calibration_samples, "length": length}
        return load_recipe({
            "pattern": pattern, "method": self.method, "calibration": text, "evaluation": None, "held_back": 0,
            "include": list(self.include), "exclude": list(self.exclude), "device": device,
            "compute_dtype": "float32",
        })  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of a recipe as they are written."""

    description: str = ""
    rule: Any = None
    method: Any = None
    pattern: Any = None
    scope: str | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)
    include: Any = ("*",)
    exclude: Any = ()
    calibration_samples: int = 32
    from_scratch: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)


def load_train_recipe(
    recipe: str | Path | Mapping[str, Any] | TrainRecipe | None, overrides: Sequence[str] = ()
) -> TrainRecipe:
    """Read a recipe and fill in defaults.

    Args:
        recipe: the name of a bundled recipe (which takes precedence over a file of that name), the path of a YAML file,
            YAML text of more than one line, a mapping, or a recipe; None: all defaults, gradual magnitude pruning to
            50 % in ten stages.
        overrides: KEY=VALUE each, such as "schedule.end=0.8".

    Raises:
        TrainingError: a key is unknown, a value out of range, or two contradict each other.
        RecipeError: there is no such recipe, or it is one of `llmprune prune`; the file cannot be read as YAML; or the
            method is unknown.

    Example:
        >>> load_train_recipe({"rule": "movement"}, ["schedule.end=0.9"]).schedule.end
        0.9
    """
    if isinstance(recipe, TrainRecipe):
        if not overrides:
            return recipe
        recipe = _written(recipe)
    document = _open(recipe)
    for assignment in overrides:
        override(document, assignment)
    tell_changes(document, overrides, "rule|method|pattern|schedule|from_scratch")
    return _checked(read_keys(_Keys, document.data, WHOLE))


def _written(recipe: TrainRecipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_dict().items() if value is not None}


def _open(recipe: str | Path | Mapping[str, Any] | None) -> Document:
    if recipe is None or isinstance(recipe, Mapping):
        return Document(json.loads(json.dumps(dict(recipe or {}), default=str)), "recipe")
    if isinstance(recipe, str) and "\n" in recipe:
        return parse_document(recipe, "recipe")
    return open_recipe(recipe, "train")


def _checked(keys: _Keys) -> TrainRecipe:
    if keys.rule is not None and keys.method is not None:
        raise TrainingError(
            "the recipe has a rule and a method",
            expected=f"a rule ({', '.join(RULES)}), or a one-shot method such as sparsegpt for each stage",
            fix="remove one of them",
        )
    if keys.scope is not None and keys.method is not None:
        raise TrainingError(
            f"scope {keys.scope} with a method, which prunes each matrix by itself",
            expected="a scope with a rule",
            fix="remove scope",
        )
    rule = GradualMagnitude() if keys.method is not None else read_rule(keys.rule or "magnitude")
    selection = read_selection(rule, keys.pattern, keys.scope)
    training = dict(keys.training)
    cycle = training.pop("cycle", "run" if rule.interval else "stage")
    if cycle not in get_args(Cycle):
        raise TrainingError(f"training.cycle is {cycle!r}", expected=" or ".join(get_args(Cycle)))
    if unused := [key for key in _UNUSED if key in training]:
        raise TrainingError(
            f"training.{unused[0]} is an option of llmprune recover",
            expected="loss, learning_rate and the like",
            fix="remove it: each stage is scored, the last is the result, and all weights train",
        )
    try:
        options = RecoveryOptions.read({"loss": "cross-entropy", "epochs": 1.0, **training})
    except LlmpruneError as error:
        raise TrainingError(f"training: {error.what}", expected=error.expected, fix=error.fix) from error
    if not isinstance(keys.calibration_samples, int) or keys.calibration_samples < 1:
        raise TrainingError(f"calibration_samples is {keys.calibration_samples!r}", expected="at least 1")
    named = "" if keys.method is not None else next(name for name, kind in RULES.items() if type(rule) is kind)
    read = TrainRecipe(
        str(keys.description), rule, named, keys.method, selection, read_schedule(keys.schedule, selection),
        _globs(keys.include, "include"), _globs(keys.exclude, "exclude"), keys.calibration_samples,
        _flag(keys.from_scratch), cycle, options,
    )  # fmt: skip
    if read.from_scratch and options.kl_weight:
        raise TrainingError(
            f"from_scratch with the loss {options.loss}",
            expected="cross-entropy: the checkpoint's own weights are not used, and so do not teach",
            fix="remove training.loss",
        )
    read.plan(read.schedule.every or 1 << 30)
    if keys.method is not None:
        read.pruning(read.schedule.end, "self", 8, "cpu")
    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TrainingError(f"from_scratch is {value!r}", expected=one_of(["true", "false"]))
    return value


def _globs(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(glob, str) for glob in value):
        raise TrainingError(f"{key} is {value!r}", expected='a list of globs such as ["*.mlp.*"]')
    return tuple(value)
