"""Recipes as text: YAML that remembers the line of every key, and overrides from the command line."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic_core import PydanticCustomError

from llmprune.errors import LlmpruneError, RecipeError

KeyPath = tuple[str | int, ...]


@dataclass
class Document:
    """A recipe as plain data, with the place (file:line, or override) where each key was set."""

    data: Any
    name: str
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """The place of a key, or of the innermost enclosing section that was set explicitly."""
        written = (path[:length] for length in range(len(path), 0, -1) if path[:length] in self.places)
        return self.places.get(next(written, ()), self.name)


# YAML is read at about half a megabyte a second.
_MOST_CHARACTERS = 1 << 19

# Keys whose values are paths or prose.
_TEXT_KEYS = ("source", "continues", "description")
_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:null")


class _RecipeLoader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: 2:4 (124 in YAML 1.1), no and dates are text, 1e-3 is a number."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - declared by the base class

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag:
            raise yaml.MarkedYAMLError(problem="an alias (*) or a tag (!)", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class RecipeDumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would not read back as text."""


_FLOAT = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"

for _kind, _form, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
):
    for _class in (_RecipeLoader, RecipeDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"({_form})$"), _first)


# Keys whose value may be a bare name, and what is set inside of them.
_NAMED = {"method": "a knob", "rule": "a knob", "allocation": "an option"}


def refusal(error: LlmpruneError, *keys: str | int) -> PydanticCustomError:
    """Our error in a form that pydantic collects with its own; `keys` lead from the value to the offending key."""
    context = {"what": error.what, "expected": error.expected, "fix": error.fix, "keys": keys, "cause": error}
    return PydanticCustomError("llmprune", "{what}", context)


def parse_document(text: str, name: str) -> Document:
    """Read a recipe from text; `name` names it in errors."""
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(
            f"{name} has {len(text):,} characters",
            expected=f"a recipe of at most {_MOST_CHARACTERS:,}",
            fix="shorten the description; texts belong into files of their own",
        )

    def place(line: int) -> str:
        return f"{name}:{line}"

    data, lines = _read_yaml(text, place)
    if not isinstance(data, dict):
        raise RecipeError(f"{name} holds {shown_value(data)}", expected="keys and values, such as pattern: 2:4")
    return Document(data, name, {path: place(line) for path, line in lines.items()})


def _read_yaml(text: str, place: Callable[[int], str]) -> tuple[Any, dict[KeyPath, int]]:
    """Read YAML as plain data, with the line of each key and list item; `place` names a line in errors."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _RecipeLoader(text)
        node = loader.get_single_node()
        return (None if node is None else _build(loader, node, (), lines)), lines
    except RecursionError as error:
        raise RecipeError(f"{place(1)}: nested too deep", expected="a recipe's keys: at most a few levels") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise RecipeError(
            f"{place(line + 1)}: {problem}",
            expected="valid YAML without aliases and tags, each key once",
            fix="check indentation and quotes; a glob that starts with * needs quotes",
        ) from error


def _build(loader: _RecipeLoader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        lines.update({(*path, index): item.start_mark.line + 1 for index, item in enumerate(node.value)})
        return [_build(loader, item, (*path, index), lines) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:  # an integer of thousands of digits
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error
    content: dict[str, Any] = {}
    for key_node, value in node.value:
        key, inside = key_node.value, (*path, key_node.value)
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a list or mapping as a key", problem_mark=key_node.start_mark)
        if key in content:
            problem = f"key {dotted(inside)!r} is already set on line {lines[inside]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        lines[inside] = key_node.start_mark.line + 1
        content[key] = _build(loader, value, inside, lines)
    return content


def override(document: Document, assignment: str) -> None:
    """Set one key, adding the sections around it if they are missing."""
    label = f"--set {assignment}"
    key, equals, text = assignment.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or "" in path:
        raise RecipeError(f"{label} cannot be read", expected="KEY=VALUE such as pattern=0.6 or calibration.samples=32")
    section = document.data
    for depth, part in enumerate(path[:-1], start=1):
        if part not in section:
            document.places[path[:depth]] = label
        section = _enter(section, part, f"{label}: {dotted(path[:depth])}")
        if part in _NAMED and section and path[depth] not in section:
            raise RecipeError(
                f"{label}: the {part} is {one_of(section)}, not {path[depth]}",
                fix=f"set {_NAMED[part]} of this {part}, or set the {part} as well",
            )
    literal = _literal(text.strip(), text_key=path[-1] in _TEXT_KEYS)
    section[path[-1]], lines = _read_yaml(text, lambda line: label) if literal is None else (literal, {})
    document.places = {old: place for old, place in document.places.items() if old[: len(path)] != path}
    document.places.update({path + inside: label for inside in ((), *lines)})


def _literal(text: str, *, text_key: bool) -> str | None:
    """The value of an override as it stands, where YAML would cut it or take it for something else; otherwise None.

    On one line, a list has brackets and a mapping has braces; a comment, an alias or a tag has no use. So a path may
    hold `#`, `: ` and `*`.
    """
    try:
        node = _RecipeLoader(text).get_single_node()
    except (yaml.YAMLError, RecursionError):
        return None if text.startswith(("[", "{")) and not text_key else text
    if node is None:
        return text or None
    whole = (node.start_mark.index, node.end_mark.index) == (0, len(text))
    if isinstance(node, yaml.ScalarNode):
        number = text_key and node.style is None and node.tag not in _TEXT_TAGS
        return None if whole and not number else text
    bracketed = isinstance(node, yaml.CollectionNode) and node.flow_style
    return None if whole and bracketed and not text_key else text


def _enter(section: dict[str, Any], part: str, where: str) -> dict[str, Any]:
    """The section of this name, added if it is missing; a bare name, as of a method, becomes a mapping to its keys."""
    child = section.setdefault(part, {})
    if part in _NAMED and isinstance(child, str):
        child = section[part] = {child: {}}
    if not isinstance(child, dict):
        raise RecipeError(
            f"{where} is {shown_value(child)}, which has no keys to set", fix="set the whole value with one --set"
        )
    return child


def tell_changes(document: Document, overrides: Sequence[str], keys: str) -> None:
    """Append the overrides of what the description describes to it, if there is a description.

    Args:
        document: changed in place.
        overrides: KEY=VALUE each.
        keys: what it describes, as alternatives of a regular expression.
    """
    described = document.data.get("description")
    given = sorted(change.strip() for change in overrides)
    changes = [change for change in given if re.match(rf"({keys})\b", change)]
    if changes and described and not any(change.startswith("description") for change in given):
        document.data["description"] = f"{described}; changed: {', '.join(changes)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(known: Iterable[str]) -> str:
    """The words that were expected."""
    names = list(known)
    return f"one of {', '.join(names)}" if names[1:] else "".join(names) or "no keys"


def shown_value(value: object) -> str:
    """A value as YAML would show it, truncated if it is long."""
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= 60 else shown[:60] + "..."


def dotted(path: KeyPath) -> str:
    """A key path as it is written in an override."""
    return ".".join(map(str, path))
