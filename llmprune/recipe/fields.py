"""The types of a recipe's values: patterns, methods, texts and globs, parsed from YAML and written back."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from typing import Annotated, Any, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import core_schema

from llmprune.errors import LlmpruneError, RecipeError
from llmprune.methods import METHODS, STEPS, Chain, Method, Step, method_name
from llmprune.patterns import NM, Pattern, parse
from llmprune.recipe.document import did_you_mean, one_of, refusal, shown_value
from llmprune.text.mix import EvaluationMix, MixPart, Text, TextMix
from llmprune.text.tokens import PROMPTS, EvaluationSpec, TextSpec

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
    chain = f"write a chain as a list: [{', '.join(re.split(r'[ ,+]+', str(name)))}]" if "," in str(name) else ""
    return RecipeError(
        f"unknown {what} {name!r}{did_you_mean(str(name), kinds)}",
        expected=one_of(kinds),
        fix=chain or f"write one of these as the {what}",
    )


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


class MixSection(BaseModel):
    """A section with several texts; `llmprune.text.mix.TextMix` says what its keys are."""

    model_config = STRICT

    samples: int | None = None
    length: int | None = None
    mix: tuple[Annotated[MixPart, WrapValidator(_read_text_spec)], ...]


class EvaluationMixSection(MixSection):
    """The same, with what both models are asked."""

    prompts: tuple[str, ...] = PROMPTS


def _refuse_beside(value: Mapping[str, object]) -> None:
    """A mix has no source of its own, and no other option of a single text but samples and length."""
    options = {field.name for field in dataclass_fields(TextSpec)} - {"samples", "length"}
    if stray := next((key for key in value if key in options), None):
        error = RecipeError(f"{stray} beside a mix of texts", expected="it in one of the texts of mix")
        raise refusal(error, stray)


def _read_calibration(value: Any, build: ValidatorFunctionWrapHandler) -> Text:
    if isinstance(value, Mapping) and "mix" in value:
        _refuse_beside(value)
        section = MixSection.model_validate_json(json.dumps(value), strict=True)
        return _built(lambda: TextMix(section.mix, section.samples, section.length), value)
    return _read_text_spec(value, build)


def _read_evaluation(value: Any, build: ValidatorFunctionWrapHandler) -> Text:
    if isinstance(value, Mapping) and isinstance(prompts := value.get("prompts"), list) and "" in prompts:
        raise refusal(RecipeError("a prompt is empty", expected="a text, or no prompts: []"), "prompts")
    if isinstance(value, Mapping) and "mix" in value:
        _refuse_beside(value)
        read = EvaluationMixSection.model_validate_json(json.dumps(value), strict=True)
        return _built(lambda: EvaluationMix(read.mix, read.samples, read.length, prompts=read.prompts), value)
    if isinstance(value, Mapping) and isinstance(prompts, list):
        value = {**value, "prompts": tuple(prompts)}
    return _read_text_spec(value, build)


def _built(build: Callable[[], TextMix], value: Mapping[str, object]) -> TextMix:
    try:
        return build()
    except LlmpruneError as error:
        raise refusal(error, *_culprit(error, value)) from error


def _write_text(text: Text | None) -> dict[str, Any] | None:
    """A text as recipes write it; in a mix, samples and length are those of all."""
    if text is None:
        return None
    content = asdict(text)
    if isinstance(text, TextMix):
        parts = [{key: part[key] for key in part if key not in ("samples", "length")} for part in content.pop("mix")]
        del content["held_back"]
        content["mix"] = parts
    return content


def _text_schema(kind: type[TextSpec], read: Callable[[Any, ValidatorFunctionWrapHandler], Text]) -> GetPydanticSchema:
    """One text is read by the type that it has; which type that is, a union of both would say in every error's path."""
    return GetPydanticSchema(
        lambda _, handler: core_schema.no_info_wrap_validator_function(
            read,
            handler.generate_schema(kind),
            serialization=core_schema.plain_serializer_function_ser_schema(_write_text),
        )
    )


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
TextField = Annotated[TextSpec | TextMix, _text_schema(TextSpec, _read_calibration)]
EvaluationField = Annotated[EvaluationSpec | EvaluationMix, _text_schema(EvaluationSpec, _read_evaluation)]
