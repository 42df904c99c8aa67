"""Parts about recipes: every key with type, default and meaning; every bundled recipe with its figures."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from llmprune.methods import Method
from llmprune.patterns import Pattern
from llmprune.recipe.allocation import RULES, Allocation
from llmprune.recipe.bundled import Command, recipe_texts
from llmprune.recipe.fields import MOST
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.recipe.reconstruct import Reconstruct
from llmprune.recipe.rotation import RotationOptions
from llmprune.recipe.sections import Experts, Quantise, Rule, StatisticsOptions
from llmprune.recipe.structures import SECTIONS, Amount, Structures
from llmprune.text.mix import MixPart, TextMix
from llmprune.text.tokens import EvaluationSpec, TextSpec
from site_parts.docstrings import attributes, summary
from site_parts.markdown import code, literal, table

# How to write a value of each type in a recipe.
_WORDS: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    ByteSize: "bytes, or text such as `4GiB`",
    Pattern: "pattern",
    Method: "method",
    NoneType: "`null`",
}
_BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def kind(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """How to write a value of a type in a recipe.

    Raises:
        KeyError: the type is unknown here.
    """
    bounds = "".join(f", {sign} {getattr(limit, name):g}" for limit, name, sign in _limits(metadata))
    if annotation == Amount:
        return "fraction below 1, or whole number of at least 1"
    if annotation is Allocation:
        return "name, section, or globs"
    if get_origin(annotation) is Annotated:
        inner, *rest = get_args(annotation)
        return kind(inner, (*metadata, *rest)) if inner not in (Pattern, Method) else _WORDS[inner]
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(kind(option) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return ", ".join(literal(word) for word in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {kind(get_args(annotation)[0])}s"
    if isinstance(annotation, type) and issubclass(annotation, TextMix):
        return "list of sections"
    if isinstance(annotation, type) and issubclass(annotation, TextSpec | BaseModel):
        return "rule" if annotation is Rule else "section"
    return _WORDS[annotation] + bounds


def recipe_keys() -> str:
    """The top-level keys of a recipe."""
    shown = load_recipe({"pattern": 0.5, "method": "magnitude"}).to_dict()
    defaults = {name: _default(shown[name]) for name in Recipe.model_fields}
    defaults |= dict.fromkeys(("pattern", "method"), "none")
    defaults["activation_budget"] = literal(ByteSize(shown["activation_budget"]).human_readable())
    return _keys(Recipe, defaults)


def rule_keys() -> str:
    """The keys of a rule."""
    return _keys(Rule)


def expert_keys() -> str:
    """The keys of the section `experts`."""
    return _keys(Experts)


def statistics_keys() -> str:
    """The keys of the section `statistics`."""
    return _keys(StatisticsOptions)


def allocation_keys() -> str:
    """The options of each allocation."""
    parts = [f"### `allocation.{name}`\n\n{summary(rule)}" for name, rule in RULES.items()]
    options = [f"\n\n{_keys(rule)}" if rule.model_fields else "" for rule in RULES.values()]
    return "\n\n".join(map("".join, zip(parts, options, strict=True)))


def reconstruct_keys() -> str:
    """The keys of the section `reconstruct`."""
    return _keys(Reconstruct)


def quantise_keys() -> str:
    """The keys of the section `quantise`."""
    return _keys(Quantise)


def rotation_keys() -> str:
    """The keys of the section `rotation`."""
    return _keys(RotationOptions)


def text_keys() -> str:
    """The keys of `calibration` and `evaluation`."""
    filled = load_recipe({"pattern": 0.5, "method": "magnitude"})
    assert filled.evaluation is not None
    types, meanings = get_type_hints(EvaluationSpec, include_extras=True), attributes(EvaluationSpec)
    rows = []
    for field in fields(EvaluationSpec):
        both = (
            _default(getattr(text, field.name)) if hasattr(text, field.name) else "not a key"
            for text in (filled.calibration, filled.evaluation)
        )
        shown = kind(types[field.name]).removesuffix(" or `null`")
        rows.append((literal(field.name), shown, *both, _in_yaml(meanings[field.name])))
    share = next(field for field in fields(MixPart) if field.name == "share")
    rows.append((literal("share"), kind(types["temperature"]), *2 * ("equal",), attributes(MixPart)[share.name]))
    return table(("key", "type", "default of calibration", "default of evaluation", "meaning"), rows)


def structure_keys() -> str:
    """The keys of the section `structures` and of each section in it."""
    parts = [_keys(Structures)]
    parts += [f"### `structures.{name}`\n\n{summary(model)}\n\n{_keys(model)}" for name, model in SECTIONS.items()]
    return "\n\n".join(parts)


def bundled_table() -> str:
    """One line per bundled recipe, with its result on the bundled model."""
    return _bundled("prune", lambda name: f"[{name}](#{name})")


def training_recipes() -> str:
    """One line per bundled recipe of `llmprune train`, with its result, and the command that made it."""
    return f"{_bundled('train', literal)}\n\n{_made_by(recipe_texts('train'))}"


def _bundled(command: Command, shown: Callable[[str], str]) -> str:
    rows = [
        (shown(name), str(yaml.safe_load(text)["description"]), _figures(text)["Testbed"])
        for name, text in recipe_texts(command).items()
    ]
    return table(("recipe", "what it does", "on the bundled model"), rows)


def bundled_recipes() -> str:
    """Each bundled recipe: its purpose, its figures and its text."""
    parts = []
    for name, text in recipe_texts().items():
        body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        parts.append(f"### {name}\n\n{_remarks(text)}\n\n{_figures(text)['Testbed']}\n\n{code(body, 'yaml')}")
    return "\n\n".join(parts)


def made_by() -> str:
    """The command that made the figures in the recipes, and the hardware."""
    return _made_by(recipe_texts())


def _made_by(texts: Mapping[str, str]) -> str:
    (line,) = {made for text in texts.values() if (made := _figures(text).get("Made by"))}
    return "Made by " + re.sub(r"^python -m [\w.]+", lambda command: literal(command[0]), line)


def _keys(model: type[BaseModel], defaults: Mapping[str, str] | None = None) -> str:
    meanings = attributes(model)
    rows = []
    for name, field in model.model_fields.items():
        default = defaults[name] if defaults else _field_default(field)
        shown = kind(field.annotation, tuple(field.metadata))
        if default == "none":
            shown = shown.removesuffix(" or `null`")
        rows.append((literal(name), shown, default, _in_yaml(meanings[name])))
    return table(("key", "type", "default", "meaning"), rows)


def _field_default(field: FieldInfo) -> str:
    return "required" if field.is_required() else _default(field.default)


def _in_yaml(text: str) -> str:
    """Replace Python's None by YAML's null."""
    return re.sub(r"\bNone\b", "`null`", text)


def _default(value: Any) -> str:
    if value is None or value == "" or value in ((), []):
        return "none"
    if isinstance(value, dict):
        return "see below"
    if isinstance(value, bool):  # as YAML writes it
        return literal(str(value).lower())
    return literal(str(list(value)).replace("'", '"') if isinstance(value, list | tuple) else value)


def _limits(metadata: tuple[Any, ...]) -> Iterator[tuple[Any, str, str]]:
    for entry in metadata:
        for limit in entry.metadata if isinstance(entry, FieldInfo) else (entry,):
            # What only keeps torch from overflowing tells no reader anything.
            if type(limit) in _BOUNDS and limit != Le(MOST):
                yield (limit, *_BOUNDS[type(limit)])


def _comments(text: str) -> list[str]:
    return [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]


def _figures(text: str) -> dict[str, str]:
    """The comments with figures: `Testbed` and `Made by` -> their text."""
    found = {"Testbed": "not measured yet"}
    for line in _comments(text):
        if match := re.match(r"(Testbed|Made by):? (.+)$", line):
            found[match[1]] = match[2]
    return found


def _remarks(text: str) -> str:
    """The other comments."""
    return " ".join(line for line in _comments(text) if not re.match(r"(Testbed|Made by)\b", line))


PARTS = {
    "recipe-keys": recipe_keys,
    "rule-keys": rule_keys,
    "expert-keys": expert_keys,
    "allocation-keys": allocation_keys,
    "reconstruct-keys": reconstruct_keys,
    "quantise-keys": quantise_keys,
    "statistics-keys": statistics_keys,
    "rotation-keys": rotation_keys,
    "text-keys": text_keys,
    "structure-keys": structure_keys,
    "bundled-table": bundled_table,
    "bundled-recipes": bundled_recipes,
    "bundled-protocol": made_by,
    "training-recipes": training_recipes,
}
