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
from llmprune.patterns import NM, Pattern, parse
from llmprune.recipe.document import did_you_mean, one_of, refusal, shown_value
from llmprune.text.tokens import TextSpec

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
