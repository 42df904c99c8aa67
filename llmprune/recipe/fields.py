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
from llmprune.methods import METHODS, Method
from llmprune.patterns import Pattern, parse
from llmprune.recipe.document import did_you_mean, one_of, refusal, shown_value
from llmprune.text.tokens import EvaluationSpec, TextSpec

STRICT = ConfigDict(frozen=True, extra="forbid")


def _culprit(error: LlmpruneError, keys: Iterable[str]) -> list[str]:
    """The key that an error names, so that its own line can be shown; empty if it names none."""
    return [key for key in keys if re.search(rf"\b{re.escape(key)}\b", error.what)][:1]


def _read_pattern(value: object) -> Pattern:
    try:
        return parse(str(value))
    except LlmpruneError as error:
        raise refusal(error) from error


def read_method(value: object) -> Method:
    """Read a method: a name, or a name with its knobs; a `Method` is returned unchanged."""
    if type(value) in METHODS.values():
        return cast(Method, value)
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        form = "one name such as wanda, or one name with its knobs such as {sparsegpt: {damping: 0.01}}"
        raise refusal(RecipeError(f"method is {shown_value(value)}", expected=form))
    ((name, knobs),) = value.items()
    if name not in METHODS:
        raise refusal(RecipeError(f"unknown method {name!r}{did_you_mean(name, METHODS)}", expected=one_of(METHODS)))
    knobs = {} if knobs is None else knobs
    # The method stays inside its one-key mapping because pydantic takes no configuration for a bare dataclass.
    kind = dict[str, METHODS[name]]  # type: ignore[valid-type]
    adapter: TypeAdapter[dict[str, Method]] = TypeAdapter(kind, config=STRICT)
    try:
        return adapter.validate_json(json.dumps({name: knobs}), strict=True)[name]
    except LlmpruneError as error:
        raise refusal(error, name, *_culprit(error, knobs)) from error


def write_method(method: Method) -> dict[str, Any]:
    """A method as recipes write it: {name: knobs}."""
    (name,) = (name for name, kind in METHODS.items() if kind is type(method))
    return {name: asdict(cast(Any, method))}


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


GlobField = Annotated[str, Field(min_length=1)]
PatternField = Annotated[Pattern, PlainValidator(_read_pattern), PlainSerializer(str)]
MethodField = Annotated[Method, PlainValidator(read_method), PlainSerializer(write_method)]
TextField = Annotated[TextSpec, WrapValidator(_read_text_spec)]
EvaluationField = Annotated[EvaluationSpec, WrapValidator(_read_evaluation)]
