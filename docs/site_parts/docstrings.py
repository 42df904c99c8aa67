"""Parts that are docstrings: of a module, of the fields of a class, of the entries of a table."""

import ast
import inspect
import re
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from site_parts.markdown import literal, table

# The heads of sections in a docstring of Google's style.
_HEADS = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$")


def find(dotted: str) -> Any:
    """What a dotted name of something in a module stands for."""
    owner, _, name = dotted.rpartition(".")
    return getattr(import_module(owner), name)


def summary(thing: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def attributes(kind: type) -> dict[str, str]:
    """What the section `Attributes` of a class and its bases says: name -> one line. Nearer classes come first."""
    found: dict[str, str] = {}
    for one in kind.__mro__:
        for name, text in _attributes(inspect.cleandoc(one.__dict__.get("__doc__") or "")):
            found.setdefault(name, text)
    return found


def module(dotted: str) -> str:
    """The docstring of a module, which is read and not run: kernels import Triton."""
    spec = find_spec(dotted)
    assert spec is not None, dotted
    assert spec.origin is not None, dotted
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8")))
    assert text, dotted
    return text


def field_table(dotted: str) -> str:
    """The fields of a class that describes its attributes: name and meaning."""
    return table(("field", "meaning"), ((literal(name), text) for name, text in attributes(find(dotted)).items()))


def function_table(dotted: str) -> str:
    """A dictionary of functions or classes: key and first line of the docstring."""
    return table(("name", "what it is"), ((literal(name), summary(thing)) for name, thing in find(dotted).items()))


def error_table() -> str:
    """Every kind of error, and what it is about."""
    errors = import_module("llmprune.errors")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    return table(("error", "what it is about"), ((literal(kind.__name__), summary(kind)) for kind in kinds))


def method_table() -> str:
    """The pruning methods: what they need, where they compare, what they do."""
    needs = {None: "nothing", "ColumnNorm": "column norms", "Gram": "Gram matrix"}
    rows = []
    for name, kind in find("llmprune.methods.METHODS").items():
        need = needs[kind.needs and kind.needs.__name__]
        rows.append((literal(name), need, f"the {kind.scope}", summary(kind)))
    return table(("method", "reads, beside the weights", "compares over", "what it does"), rows)


def knob_table() -> str:
    """The knobs of all methods that have any."""
    rows = []
    for name, kind in find("llmprune.methods.METHODS").items():
        meanings = attributes(kind)
        for field in fields(kind):
            default = "required" if field.default is MISSING else literal(field.default)
            rows.append((literal(f"{name}.{field.name}"), default, meanings[field.name]))
    return table(("knob", "default", "meaning"), rows)


def api() -> str:
    """Every public name, with the place that mkdocstrings reads its documentation from."""
    package = import_module("llmprune")
    homes = package._HOMES
    names = sorted((name for name in package.__all__ if name in homes), key=str.lower)
    assert set(package.__all__) - set(names) == {"__version__"}
    options = "    options:\n      heading: llmprune.{0}\n      toc_label: {0}\n      heading_level: 2"
    return "\n\n".join(f"::: llmprune.{homes[name]}.{name}\n{options.format(name)}" for name in names)


def _attributes(docstring: str) -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    inside = False
    for line in docstring.splitlines():
        if _HEADS.match(line):
            inside = line == "Attributes:"
        elif inside and (start := re.match(r"^    (\w+): (.+)$", line)):
            entries.append((start[1], start[2]))
        elif inside and line.startswith("        "):
            name, text = entries.pop()
            entries.append((name, f"{text} {line.strip()}"))
    return entries


PARTS = {
    "module": module,
    "fields": field_table,
    "functions": function_table,
    "errors": error_table,
    "methods": method_table,
    "knobs": knob_table,
    "api": api,
}
