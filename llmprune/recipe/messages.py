"""Validation errors in the terms of a recipe, where pydantic's are in those of Python and JSON."""

from collections.abc import Callable

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmprune.errors import RecipeError
from llmprune.recipe.document import Document, KeyPath, did_you_mean, dotted, one_of, shown_value


def explain(
    error: ValidationError, document: Document, known_keys: Callable[[KeyPath], list[str]]
) -> tuple[Exception, RecipeError]:
    """Translate pydantic's error to ours: all problems with their places, then what was expected instead.

    Args:
        error: pydantic's.
        document: the recipe that was validated.
        known_keys: the keys that the section at a path may have.

    Returns:
        The cause, and our error.
    """
    details = error.errors(include_url=False)
    problems = [_problem(detail, document, known_keys) for detail in details]
    what, expected, fix = ("\n".join(dict.fromkeys(filter(None, parts))) for parts in zip(*problems, strict=True))
    cause = next((detail["ctx"]["cause"] for detail in details if detail["type"] == "llmprune"), error)
    return cause, RecipeError(what, expected=expected, fix=fix)


def _problem(
    detail: ErrorDetails, document: Document, known_keys: Callable[[KeyPath], list[str]]
) -> tuple[str, str, str]:
    """What happened, what was expected, how to fix it."""
    context = detail.get("ctx", {})
    path: KeyPath = (*detail["loc"], *context.get("keys", ()))
    place, name, kind = document.place(path), dotted(path), detail["type"]
    if kind == "llmprune":
        return f"{place}: {context['what']}" + (f" (in {name})" if path else ""), context["expected"], context["fix"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known, section = known_keys(path[:-1]), f" in {dotted(path[:-1])}" if path[1:] else ""
        hint = did_you_mean(str(path[-1]), known)
        fix = "" if hint else "remove it; `llmprune recipes NAME` prints a recipe with all keys"
        return f"{place}: unknown key {str(path[-1])!r}{section}{hint}", one_of(known), fix
    if kind == "missing":
        return f"{place}: {name} is missing", "", ""
    expected = _EXPECTED.get(kind, detail["msg"].removeprefix("Input should be "))
    fix = "put it in quotes" if kind == "string_type" and isinstance(detail["input"], int | float) else ""
    return f"{place}: {name} is {shown_value(detail['input'])}", expected, fix


# Replaces wording of pydantic that is about Python or JSON.
_EXPECTED = {
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "keys and values",
    "dataclass_type": "keys and values",
    "string_too_short": "text that is not empty",
    "byte_size": "bytes, or a size such as 512MiB or 4GB",
    "byte_size_unit": "bytes, or a size such as 512MiB or 4GB",
}
