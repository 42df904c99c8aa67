"""Everything a run needs: YAML for people, frozen values for the code.

    description: SparseGPT, 2:4 in the attention and half of the weights elsewhere
    pattern: 0.5
    method: {sparsegpt: {damping: 0.01}}
    rules:
      - match: "*.self_attn.*"
        pattern: "2:4"
    calibration: {source: self, samples: 128}

pydantic checks the types. Added here are the bundled names, the overrides, and errors that say where a mistake is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llmprune.errors import RecipeError
from llmprune.methods import METHODS, STEPS, Method
from llmprune.patterns import Pattern
from llmprune.recipe.aliases import known_assignment, rename_keys
from llmprune.recipe.allocation import RULES, AllocationField, Uniform, check_allocation
from llmprune.recipe.bundled import open_recipe
from llmprune.recipe.document import (
    Document,
    KeyPath,
    RecipeDumper,
    override,
    parse_document,
    refusal,
    tell_changes,
)
from llmprune.recipe.fields import (
    MOST,
    STRICT,
    EvaluationField,
    GlobField,
    MethodField,
    PatternField,
    TextField,
    check_device,
)
from llmprune.recipe.globs import covers, matches_any
from llmprune.recipe.messages import explain
from llmprune.recipe.mixes import spread_mixes
from llmprune.recipe.reconstruct import Reconstruct
from llmprune.recipe.refusals import check_methods, check_unused_statistics, check_validation
from llmprune.recipe.rotation import RotationOptions
from llmprune.recipe.sections import Experts, Quantise, Rule, StatisticsOptions
from llmprune.recipe.structures import SECTIONS, Structures
from llmprune.storage.packed_config import Format, layout_name
from llmprune.text.mix import MixPart, Text
from llmprune.text.tokens import EvaluationSpec, TextSpec

_RECIPE_FORMS = "a bundled recipe's name, the path of a YAML file, YAML text, a mapping or a Recipe"

# The defaults of the section evaluation; its length defaults to that of calibration.
_EVALUATION = {"samples": 32, "seed": 12345}


class Recipe(BaseModel):
    """Everything a run needs. Built by `load_recipe`, which turns mistakes into `RecipeError`.

    Attributes:
        pattern: sparsity pattern of the weights; None, like the method, if only structures are removed.
        method: how the weights to remove are chosen, with its knobs.
        structures: what is removed physically, before weights are pruned; None: nothing.
        rotation: how the residual stream is rotated before anything is pruned; None: not at all.
        description: one line for people; not part of the digest.
        include: shell globs over full matrix names such as model.layers.3.self_attn.q_proj; other matrices stay dense.
        exclude: globs of included matrices that stay dense nevertheless.
        rules: the first matching rule changes the pattern or method of a matrix.
        allocation: how sparse each matrix becomes, with the same number of zeros in all: uniform, owl, alpha, dlp, atp,
            sensitivity, search, one of them with its options, or shell globs with sparsities.
        calibration: the calibration text, or a mix of several, on which statistics are collected.
        evaluation: the text, or a mix, on which perplexity is measured, and prompts that both models answer; None skips
            both.
        batch_size: sequences per forward pass, at least 1; results do not depend on it, up to rounding.
        held_back: validation sequences: further calibration sequences, at least 0, that only measure the relative
            output error in the report; with 0 it is measured on the rows of the statistics.
        decoder_layers: module path of the list of decoder layers, for models in which it cannot be identified.
        reconstruct: how each layer is fitted as a whole once its matrices are solved; None: it is not.
        quantise: how the weights that are kept are quantised, once layers are solved and fitted; None: they are not.
        statistics: how inputs enter the statistics.
        experts: settings for the experts of MoE layers.
        device: auto, cpu, cuda or cuda:N.
        format: how pruned matrices are stored: dense, with their zeros; nm, block or bitmask if the pattern is of that
            kind (bitmask: any); auto: what suits each pattern. Weights quantised to 8 bits are stored as such (int8-nm,
            int8-bitmask). Loading a packed checkpoint requires llmprune.
        compute_dtype: dtype of the forward pass; auto is the checkpoint's, or float32 on a CPU without instructions
            for it.
        activation_budget: bytes of hidden states kept in memory, at least 0; the rest is written to disk.
        report_to: the experiment tracker that gets the figures of every layer and of the whole run; None: no one.
    """

    model_config = STRICT

    description: str = ""
    pattern: PatternField | None = None
    method: MethodField | None = None
    structures: Structures | None = None
    rotation: RotationOptions | None = None
    include: tuple[GlobField, ...] = ("*",)
    exclude: tuple[GlobField, ...] = ()
    rules: tuple[Rule, ...] = ()
    allocation: AllocationField = Uniform()
    calibration: TextField = TextSpec()
    evaluation: EvaluationField | None = Field(default_factory=dict, validate_default=True)
    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 8
    held_back: Annotated[int, Field(ge=0, le=MOST)] = 4
    decoder_layers: Annotated[str, Field(min_length=1)] | None = None
    reconstruct: Reconstruct | None = None
    quantise: Quantise | None = None
    statistics: StatisticsOptions = StatisticsOptions()
    experts: Experts = Experts()
    device: Annotated[str, AfterValidator(check_device)] = "auto"
    format: Format = "dense"
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    activation_budget: ByteSize = ByteSize(4 * 2**30)
    report_to: Literal["wandb", "tensorboard", "mlflow"] | None = None

    @field_validator("evaluation", mode="before")
    @classmethod
    def _complete_evaluation(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, Mapping):
            return value
        calibration: Text = info.data.get("calibration", TextSpec())
        length, samples = calibration.length, _EVALUATION["samples"]
        if isinstance(mix := value.get("mix"), Sequence):
            parts = [_evaluated(part) if isinstance(part, Mapping) else part for part in mix]
            return {"length": length, "samples": samples, **value, "mix": parts}
        return {"length": length, "samples": samples, **_evaluated(value)}

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if absent := [name for name in ("pattern", "method") if getattr(self, name) is None]:
            self._check_without_weights(absent)
            return self
        if not self.include:
            raise refusal(RecipeError("include is empty: nothing would be pruned", fix="remove the key"), "include")
        if all(any(covers(out, glob) for out in self.exclude) for glob in self.include):
            raise refusal(RecipeError("exclude covers all of include: nothing would be pruned"), "exclude")
        for number, rule in enumerate(self.rules):
            _check_reachable(rule, self.rules[:number])
        weights = self.pattern, self.method, self.rules, self.statistics
        check_methods(*weights, structures=self.structures is not None)
        check_unused_statistics(*weights, quantised=self.quantise is not None)
        if self.statistics.sequential and any(getattr(p, "over", None) == "layer" for p in self.patterns):
            error = RecipeError(
                "statistics.sequential with a pattern that compares weights over the whole layer",
                expected="/row or /matrix: a layer's matrices are pruned before all of their scores are known",
                fix="change the pattern, or set statistics.sequential to false",
            )
            raise refusal(error, "statistics", "sequential")
        check_validation(self.reconstruct, self.held_back)
        if self.format != "dense" and not any(layout_name(self.format, pattern) for pattern in self.patterns):
            error = RecipeError(
                f"format is {self.format}, which stores none of {', '.join(map(str, self.patterns))}",
                expected="nm for N:M, block for square blocks of 16, 32, 64 or 128, bitmask or auto for anything",
                fix="change the format or the pattern",
            )
            raise refusal(error, "format")
        check_allocation(self.allocation, self.patterns, structures=self.structures is not None)
        self._check_seeds()
        return self

    def _check_without_weights(self, absent: Sequence[str]) -> None:
        """A recipe that prunes no weights must remove structures, and say nothing about weights."""
        if self.structures is None or len(absent) == 1:
            missing = RecipeError(
                f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing",
                expected="pattern and method, which prune weights, or structures, which removes heads, channels or "
                "layers, or both",
            )
            raise refusal(missing)
        given = {"rules": bool(self.rules), "format": self.format != "dense"}
        given["quantise"] = self.quantise is not None
        given["allocation"] = not isinstance(self.allocation, Uniform)
        if key := next((key for key, there in given.items() if there), None):
            raise refusal(RecipeError(f"{key} without a pattern and a method", fix="add them, or remove the key"), key)
        check_unused_statistics(None, None, (), self.statistics)
        check_validation(self.reconstruct, self.held_back)
        self._check_seeds()

    def _check_seeds(self) -> None:
        seeds = [
            {part.seed for part in text.parts if part.source == "self"} if text else set()
            for text in (self.calibration, self.evaluation)
        ]
        if both := seeds[0] & seeds[1]:
            error = RecipeError(
                f"evaluation.seed and calibration.seed are both {min(both)}",
                expected="two different seeds; with the same one, perplexity would be measured on the calibration text",
                fix="change one of them",
            )
            raise refusal(error, "evaluation", *(["seed"] if isinstance(self.evaluation, EvaluationSpec) else []))

    @property
    def patterns(self) -> list[Pattern]:
        """The patterns of the recipe and of its rules."""
        return [pattern for pattern in (self.pattern, *(rule.pattern for rule in self.rules)) if pattern is not None]

    @property
    def hidden_sets(self) -> int:
        """Sets of hidden states in memory or on disk: the pruned model's, and those that layers are compared with."""
        sets = 1 if self.reconstruct is None else self.reconstruct.hidden_sets
        # The dense model's are kept once for both.
        shared = self.reconstruct is not None and self.reconstruct.target != "local"
        depth = None if self.structures is None else self.structures.depth
        replaced = depth is not None and depth.replace is not None
        return max(sets + (self.statistics.alpha > 0 and not shared), 1 + replaced)

    @property
    def texts(self) -> dict[str, Text]:
        """The texts of a run: "calibration", with the validation sequences, and "evaluation", if there is one."""
        held_back = self.calibration.with_held_back(self.held_back)
        return {"calibration": held_back, **({"evaluation": self.evaluation} if self.evaluation else {})}

    def fitted(self, positions: int | None, device: str) -> "Recipe":
        """The recipe with its texts' sizes filled in, as `TextSpec.fitted` does."""
        evaluation = self.evaluation and self.evaluation.fitted(positions, device)
        calibration = self.calibration.fitted(positions, device)
        return self.model_copy(update={"calibration": calibration, "evaluation": evaluation})

    def for_matrix(self, name: str) -> tuple[Pattern, Method] | None:
        """Say how the matrix of this full name is pruned; None if it stays dense."""
        if self.pattern is None or self.method is None:
            return None
        if not matches_any(self.include, name) or matches_any(self.exclude, name):
            return None
        rule = next((rule for rule in self.rules if fnmatchcase(name, rule.match)), None)
        if rule is None:
            return self.pattern, self.method
        return rule.pattern or self.pattern, rule.method or self.method

    def to_dict(self) -> dict[str, Any]:
        """Write every key and every knob as plain data, ready for JSON and for `load_recipe`."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Write every key and every knob as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.dump(self.to_dict(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)

    @property
    def digest(self) -> str:
        """sha256, in hex, of everything but the description; independent of how the recipe was written."""
        content = self.model_dump(mode="json", exclude={"description"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and fill in defaults.

    Args:
        recipe: the name of a bundled recipe (which takes precedence over a file of that name), the path of a YAML file,
            YAML text of more than one line, a mapping of plain data, or a recipe. Some keys may have the names that
            other tools give them: see `recipe.aliases`.
        overrides: KEY=VALUE each, such as "pattern=2:4" or "method.sparsegpt.damping=0.05"; values are YAML. Their
            order does not matter: sections are set before the keys inside them.

    Raises:
        RecipeError: for unknown, missing, contradictory or repeated keys, wrong types, values out of range, unreadable
            patterns and invalid YAML, each with its line or override; for a recipe that does not exist.

    Example:
        >>> load_recipe({"pattern": "2:4", "method": "wanda"}, ["calibration.samples=32"]).calibration.samples
        32
    """
    if isinstance(recipe, Recipe) and not overrides:
        return recipe
    overrides = [overrides] if isinstance(overrides, str) else overrides
    document = _open(recipe)
    rename_keys(document)
    spread_mixes(document)
    overrides = [known_assignment(assignment) for assignment in overrides]
    keys = [assignment.partition("=")[0].strip() for assignment in overrides]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise RecipeError(f"--set {repeated[0]} is given {keys.count(repeated[0])} times", fix="keep one of them")
    for assignment, _ in sorted(zip(overrides, keys, strict=True), key=lambda pair: pair[1].count(".")):
        override(document, assignment)
        rename_keys(document)
        spread_mixes(document)
    tell_changes(document, overrides, "pattern|method|structures|rules")
    try:
        # As JSON, for which pydantic's strict types accept lists as tuples and mappings as dataclasses.
        return Recipe.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        cause, refused = explain(error, document, _known_keys)
        raise refused from cause


def _evaluated(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text of the evaluation, with its defaults."""
    # Published perplexities are of a text's first sequences; self-generated text has no order to choose.
    order = {} if text.get("source", "self") == "self" else {"order": "text"}
    return {"seed": _EVALUATION["seed"], **order, **text}


def _check_reachable(rule: Rule, earlier: Sequence[Rule]) -> None:
    for other in earlier:
        if covers(other.match, rule.match):
            error = RecipeError(
                f"the rule for {rule.match!r} is never reached: the earlier {other.match!r} matches the same matrices",
                fix="put the narrower rule first",
            )
            raise refusal(error, "rules", len(earlier))


def _open(recipe: str | Path | Mapping[str, Any] | Recipe) -> Document:
    if isinstance(recipe, Recipe):
        return Document(recipe.to_dict(), "recipe")
    if isinstance(recipe, Mapping):
        return Document(json.loads(json.dumps(dict(recipe), default=str)), "recipe")
    if not isinstance(recipe, str | Path):
        raise RecipeError(f"a recipe of type {type(recipe).__name__}", expected=_RECIPE_FORMS, fix="pass one of these")
    if isinstance(recipe, str) and "\n" in recipe:
        return parse_document(recipe, "recipe")
    return open_recipe(recipe, "prune")


def _known_keys(section: KeyPath) -> list[str]:
    """The keys that a section may have."""
    match section:
        case ("calibration" | "evaluation",):
            kind = TextSpec if section == ("calibration",) else EvaluationSpec
            return [*(knob.name for knob in fields(kind)), "mix"]
        case ("calibration" | "evaluation", "mix", _):
            return [knob.name for knob in fields(MixPart) if knob.name not in ("samples", "length")]
        case ("experts",):
            return list(Experts.model_fields)
        case ("statistics",):
            return list(StatisticsOptions.model_fields)
        case ("reconstruct",):
            return list(Reconstruct.model_fields)
        case ("rotation",):
            return list(RotationOptions.model_fields)
        case ("structures",):
            return list(Structures.model_fields)
        case ("structures", str(part)) if part in SECTIONS:
            return list(SECTIONS[part].model_fields)
        case ("allocation", str(name)) if name in RULES:
            return list(RULES[name].model_fields)
        case ("rules", _):
            return list(Rule.model_fields)
        case (*_, "method", str(name)) | (*_, "method", int(_), str(name)):
            return [knob.name for knob in fields(cast(Any, {**METHODS, **STEPS}[name]))]
    return list(Recipe.model_fields)
