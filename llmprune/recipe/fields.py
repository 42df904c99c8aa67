"""The types of a recipe's values: patterns, methods, texts and globs, parsed from YAML and written back."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, cast

from pydantic import (
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from llmprune.errors import LlmpruneError, RecipeError
from llmprune.methods import METHODS, STEPS, Chain, Method, Step, method_name
from llmprune.patterns import NM, Pattern, parse
from llmprune.recipe.document import did_you_mean, one_of, refusal, shown_value
from llmprune.text.tokens import EvaluationSpec, TextSpec

STRICT = ConfigDict(frozen=True, extra="forbid")


def _culprit(error: LlmpruneError, keys: Iterable[str]) -> list[str]:
    """The key that an error names, so that its own line can be shown; empty if it names none."""
    return [key for key in keys if re.search(rf"\b{re.escape(key)}\b", error.what)][:1]


def _read_pattern(value: object) -> Pattern:
    try:
        pattern = parse(str(value))
    except LlmpruneError as error:
        raise refusal(error) from error
    if (pattern.keep == 0) if isinstance(pattern, NM) else (pattern.sparsity == 1):
        raise refusal(
            RecipeError(
                f"pattern {value} removes every weight",
                expected="a pattern that keeps some, such as 2:4 or 0.5",
                fix="N in N:M is how many are kept; to remove whole layers or blocks, use structures",
            )
        )
    return pattern


def read_method(value: object) -> Method:
    """Read a method: a name, a name with its knobs, or a list of a method and steps; a `Method` is left as it is."""
    if type(value) in (*METHODS.values(), Chain):
        return cast(Method, value)
    if not isinstance(value, list):
        return cast(Method, _read_part(value, METHODS, "method"))
    if not value:
        raise refusal(RecipeError("method is an empty list", expected="a method and steps, such as [wanda, refit]"))
    method = cast(Method, _read_part(value[0], METHODS, "method"))
    parts = [(part, cast(Step, _read_part(part, STEPS, "step"))) for part in value[1:]]
    steps = tuple((part if isinstance(part, str) else next(iter(part)), step) for part, step in parts)
    return Chain(method, steps) if steps else method


def _read_part(value: object, kinds: Mapping[str, type], what: str) -> object:
    """Read one method or step: a name, or a name with its knobs."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        form = (
            "one name such as wanda, one name with its knobs such as {sparsegpt: {damping: 0.01}}, "
            "or a list of a method and steps such as [wanda, swaps, refit]"
        )
        raise refusal(RecipeError(f"{what} is {shown_value(value)}", expected=form))
    ((name, knobs),) = value.items()
    if name not in kinds:
        raise refusal(_unknown(name, kinds, what))
    knobs = {} if knobs is None else knobs
    # It stays inside its one-key mapping because pydantic takes no configuration for a bare dataclass.
    adapter: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, kinds[name]], config=STRICT)  # type: ignore[valid-type]
    try:
        return adapter.validate_json(json.dumps({name: knobs}), strict=True)[name]
    except LlmpruneError as error:
        raise refusal(error, name, *_culprit(error, knobs)) from error


def _unknown(name: object, kinds: Mapping[str, type], what: str) -> RecipeError:
    if name in METHODS:
        return RecipeError(
            f"{name} is a method, and stands after another one",
            expected=f"one method that chooses the zeros, then steps: {one_of(STEPS)}",
            fix=f"put {name} first, or remove it",
        )
    if name in STEPS:
        return RecipeError(
            f"{name} improves the result of a method, and there is none before it",
            expected=f"a list such as [wanda, {name}], which begins with {one_of(METHODS)}",
        )
    return RecipeError(f"unknown {what} {name!r}{did_you_mean(str(name), kinds)}", expected=one_of(kinds))


def write_method(method: Method) -> dict[str, Any] | list[dict[str, Any]]:
    """A method as recipes write it: {name: knobs}, or a list of these."""
    if isinstance(method, Chain):
        return [{method_name(method.method): asdict(cast(Any, method.method))}] + [
            {name: asdict(cast(Any, step))} for name, step in method.steps
        ]
    return {method_name(method): asdict(cast(Any, method))}


def _read_text_spec(value: Any, build: ValidatorFunctionWrapHandler) -> TextSpec:
    try:
        return cast(TextSpec, build(value))
    except LlmpruneError as error:
        raise refusal(error, *_culprit(error, value)) from error


def _read_evaluation(value: Any, build: ValidatorFunctionWrapHandler) -> EvaluationSpec:
    if isinstance(value, Mapping) and isinstance(prompts := value.get("prompts"), list):
        if "" in prompts:
            raise refusal(RecipeError("a prompt is empty", expected="a text, or no prompts: []"), "prompts")
        value = {**value, "prompts": tuple(prompts)}
    return cast(EvaluationSpec, _read_text_spec(value, build))


def check_device(name: str) -> str:
    """Refuse a text that names no device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise refusal(RecipeError(f"device is {name!r}", expected="auto, cpu, cuda, or one GPU such as cuda:1"))
    return name


# Sizes beyond it overflow in torch, and no run has as many of anything.
MOST = (1 << 31) - 1

GlobField = Annotated[str, Field(min_length=1)]
PatternField = Annotated[Pattern, PlainValidator(_read_pattern), PlainSerializer(str)]
MethodField = Annotated[Method, PlainValidator(read_method), PlainSerializer(write_method)]
TextField = Annotated[TextSpec, WrapValidator(_read_text_spec)]
EvaluationField = Annotated[EvaluationSpec, WrapValidator(_read_evaluation)]
