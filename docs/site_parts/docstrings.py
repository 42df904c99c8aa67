"""Parts made of docstrings: of a module, of the fields of a class, of the entries of a table."""

import ast
import inspect
import re
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from site_parts.markdown import literal, table

# Section headings in Google-style docstrings.
_HEADS = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$")


def find(dotted: str) -> Any:
    """The object that a dotted name refers to."""
    owner, _, name = dotted.rpartition(".")
    return getattr(import_module(owner), name)


def summary(thing: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def attributes(kind: type) -> dict[str, str]:
    """The `Attributes` sections of a class and its bases: name -> one line. Derived classes take precedence."""
    found: dict[str, str] = {}
    for one in kind.__mro__:
        for name, text in _attributes(inspect.cleandoc(one.__dict__.get("__doc__") or "")):
            found.setdefault(name, text)
    return found


def module(dotted: str) -> str:
    """The docstring of a module, read without importing it, because kernels import Triton."""
    spec = find_spec(dotted)
    assert spec is not None, dotted
    assert spec.origin is not None, dotted
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8")))
    assert text, dotted
    return text


def field_table(dotted: str) -> str:
    """The documented fields of a class: name and meaning."""
    return table(("field", "meaning"), ((literal(name), text) for name, text in attributes(find(dotted)).items()))


def function_table(dotted: str) -> str:
    """A dictionary of functions or classes: key and first docstring line."""
    return table(("name", "meaning"), ((literal(name), summary(thing)) for name, thing in find(dotted).items()))


def error_table() -> str:
    """Every error class and its meaning."""
    errors = import_module("llmprune.errors")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    return table(("error", "meaning"), ((literal(kind.__name__), summary(kind)) for kind in kinds))


def method_table() -> str:
    """The pruning methods: the statistics that they need, the scope of comparison, what they do."""
    needs = {None: "nothing", "ColumnNorm": "column norms", "Gram": "Hessian (Gram matrix)"}
    rows = []
    for name, kind in find("llmprune.methods.METHODS").items():
        need = needs[kind.needs and kind.needs.__name__]
        if hasattr(kind, "gradient"):
            need = "gradients of the loss"
        rows.append((literal(name), need, f"the {kind.scope}", summary(kind)))
    return table(("method", "statistics", "compares over", "what it does"), rows)


def step_table() -> str:
    """The steps that improve a method's result."""
    return function_table("llmprune.methods.STEPS")


def knob_table() -> str:
    """The parameters of all methods and steps."""
    rows = []
    for name, kind in {**find("llmprune.methods.METHODS"), **find("llmprune.methods.STEPS")}.items():
        meanings = attributes(kind)
        for field in fields(kind):
            default = "required" if field.default is MISSING else literal(field.default)
            rows.append((literal(f"{name}.{field.name}"), default, meanings[field.name]))
    return table(("parameter", "default", "meaning"), rows)


def api() -> str:
    """Every public name, with the place where mkdocstrings finds its documentation."""
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
    "steps": step_table,
    "knobs": knob_table,
    "api": api,
}
