"""Other names of some recipe keys: those by which the field knows them."""

from collections.abc import Mapping
from typing import Any

from llmprune.errors import RecipeError
from llmprune.methods import METHODS, STEPS
from llmprune.recipe.document import Document, KeyPath, dotted

# The names of other tools -> ours, by the key that they are directly below; "" is the recipe itself.
_TEXT = {"num_samples": "samples", "max_seq_length": "length"}
_ALIASES: Mapping[str, Mapping[str, str]] = {
    "": {"num_validation": "held_back"},
    "calibration": _TEXT,
    "evaluation": _TEXT,
    "mix": _TEXT,
    **{name: {"dampening_frac": "damping"} for name, kind in {**METHODS, **STEPS}.items() if hasattr(kind, "damping")},
}


def known_path(path: KeyPath) -> KeyPath:
    """The path of a key with each part under our name."""
    # The items of a list are named by their numbers; what is in them belongs to the list.
    parents = [""]
    for part in path[:-1]:
        parents.append(parents[-1] if isinstance(part, int) else part)
    return tuple(_ALIASES.get(str(parent), {}).get(str(part), part) for parent, part in zip(parents, path, strict=True))


def known_assignment(assignment: str) -> str:
    """An override KEY=VALUE with the key under our names."""
    key, equals, value = assignment.partition("=")
    return f"{dotted(known_path(tuple(key.strip().split('.'))))}{equals}{value}"


def rename_keys(document: Document) -> None:
    """Bring every key of a recipe under our names, in place.

    Raises:
        RecipeError: a key is given under both of its names.
    """
    _rename(document, document.data, ())
    document.places = {known_path(path): place for path, place in document.places.items()}


def _rename(document: Document, data: Any, path: KeyPath) -> None:
    if isinstance(data, list):
        for index, item in enumerate(data):
            _rename(document, item, (*path, index))
    if not isinstance(data, dict):
        return
    for key in list(data):
        _rename(document, data[key], (*path, key))
        name = known_path((*path, key))[-1]
        if name != key:
            if name in data:
                raise RecipeError(
                    f"{document.place((*path, key))}: {key} and {name} are two names of one key",
                    fix=f"remove {key} or {name}",
                )
            data[name] = data.pop(key)
