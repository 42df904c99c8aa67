"""A grid of recipes: every combination of some keys' values, each with a label that says what differs."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmprune.errors import LlmpruneError, RecipeError
from llmprune.recipe.document import Document, RecipeDumper, override
from llmprune.recipe.recipe import Recipe, load_recipe

Grid = Mapping[str, Sequence[Any]]

_PIECE = re.compile(r"""'[^']*'|"(?:[^"\\]|\\.)*"|.""", re.DOTALL)

# Longer folder names are hard to read, and file systems allow 255 bytes.
_LONGEST_NAME = 80

# The keys that the dense model's hidden states depend on; runs that agree in all of them are made consecutively.
_DENSE_KEYS = ("evaluation", "batch_size", "activation_budget", "compute_dtype", "device", "decoder_layers")


@dataclass(frozen=True, slots=True)
class Combination:
    """One point of a grid.

    Attributes:
        label: says what differs from the others; safe as a file name, and unique in its grid even ignoring case.
        settings: key of the recipe -> its value here, JSON-ready.
        recipe: the complete recipe.
    """

    label: str
    settings: dict[str, Any]
    recipe: Recipe


def read_grid(settings: Sequence[str]) -> dict[str, list[Any]]:
    """Read "KEY=VALUE,VALUE,..." settings; each value is YAML, as in an override of a recipe.

    A comma inside [], {} or quotes does not separate values.

    Raises:
        RecipeError: a setting has another form, a value is not YAML, or a key is given twice.

    Example:
        >>> read_grid(["pattern=0.5,2:4", "exclude=['*.q_proj', '*.k_proj'],[]"])
        {'pattern': [0.5, '2:4'], 'exclude': [['*.q_proj', '*.k_proj'], []]}
    """
    grid: dict[str, list[Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key, pieces = key.strip(), _split(text)
        if key in grid:
            raise RecipeError(f"--set {key} is given twice", fix=f"give all values at once: --set {key}=VALUE,VALUE")
        if len(pieces) > 1 and any(not piece.strip() for piece in pieces):
            raise RecipeError(f"--set {setting} has an empty value", fix="remove a comma, or write null")
        grid[key] = [_read(f"{key}{equals}{piece}", key) for piece in pieces]
    return grid


def combine(recipe: str | Path | Mapping[str, Any] | Recipe, grid: Grid) -> list[Combination]:
    """Load the recipe of every combination; those that can share a pass over the dense model are adjacent.

    Args:
        recipe: what all combinations have in common, as `load_recipe` takes it.
        grid: key of the recipe -> its values, as YAML would hold them; a single value applies to all combinations.

    Raises:
        RecipeError: a combination is not a valid recipe (all mistakes are reported at once), or two are identical.
    """
    settings = _product(grid)
    recipes: list[Recipe] = []
    mistakes: list[tuple[dict[str, Any], LlmpruneError]] = []
    for chosen in settings:
        try:
            recipes.append(load_recipe(recipe, [f"{key}={written(value)}" for key, value in chosen.items()]))
        except LlmpruneError as error:
            mistakes.append((chosen, error))
    refuse(mistakes, len(settings))
    _require_different(settings, recipes)
    labels = _labels(settings, recipes)
    found = [Combination(*parts) for parts in zip(labels, settings, recipes, strict=True)]
    order = {_dense_key(one.recipe): number for number, one in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda one: order[_dense_key(one.recipe)])


def refuse(mistakes: Sequence[tuple[Mapping[str, Any], LlmpruneError]], total: int) -> None:
    """Raise all mistakes as one error, each once; do nothing if there are none.

    Args:
        mistakes: (settings, error) of combinations.
        total: the number of combinations.

    Raises:
        LlmpruneError: the error itself if it is always the same, otherwise a `RecipeError` that lists them.
    """
    if len({str(error) for _, error in mistakes}) == 1:
        raise mistakes[0][1]
    lines = [f"{len(mistakes)} of {total} combinations cannot be run:"]
    told: set[str] = set()
    # A combination of two bad values repeats both of their errors; the shorter errors are listed first.
    for settings, error in sorted(mistakes, key=lambda mistake: mistake[1].what.count("\n")):
        parts = set(error.what.splitlines())
        if not parts <= told:
            lines += [f"{shown(settings)}:", *(f"  {line}" for line in str(error).splitlines())]
        told |= parts
    if mistakes:
        raise RecipeError("\n".join(lines), fix="fix these, or leave them out of the grid")


def shown(settings: Mapping[str, Any]) -> str:
    """Settings as they would be typed."""
    return " ".join(f"{key}={written(value)}" for key, value in settings.items()) or "the recipe"


def written(value: Any) -> str:
    """A plain value as YAML on one line."""
    options: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": 1 << 20}
    return yaml.dump(value, Dumper=RecipeDumper, **options).removesuffix("\n").removesuffix("\n...")


def _split(text: str) -> list[str]:
    pieces, depth = [""], 0
    for piece in _PIECE.findall(text):
        depth = max(depth + (piece in ("[", "{")) - (piece in ("]", "}")), 0)
        if piece == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += piece
    return pieces


def _read(assignment: str, key: str) -> Any:
    """The value of an override, parsed as in a recipe."""
    document = Document({}, "grid")
    override(document, assignment)
    value = document.data
    for part in key.split("."):
        value = value[part]
    return value


def _product(grid: Grid) -> list[dict[str, Any]]:
    for key, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise RecipeError(f"{key}: {values!r} in a grid", expected="a list of one or more values")
    # As in a recipe given as a mapping, patterns and paths become text.
    plain = {key: [json.loads(json.dumps(value, default=str)) for value in values] for key, values in grid.items()}
    return [dict(zip(plain, values, strict=True)) for values in itertools.product(*plain.values())]


def _require_different(settings: Sequence[dict[str, Any]], recipes: Sequence[Recipe]) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for chosen, recipe in zip(settings, recipes, strict=True):
        if (other := seen.setdefault(recipe.digest, chosen)) is not chosen:
            raise RecipeError(
                f"{shown(other)} and {shown(chosen)} are the same run",
                expected="combinations that differ",
                fix="leave out one of these values",
            )


def _labels(settings: Sequence[dict[str, Any]], recipes: Sequence[Recipe]) -> list[str]:
    """Labels from the keys that have several values; a digest is added to labels that would be the same."""
    varied = [key for key in settings[0] if any(chosen[key] != settings[0][key] for chosen in settings)]
    ends = Counter(key.rpartition(".")[2] for key in varied)
    short = {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in varied}
    # A method's name needs no key in front of it.
    heads = {key: "" if key == "method" else f"{short[key]}-" for key in varied}
    labels = ["_".join(heads[key] + _slug(chosen[key]) for key in varied) for chosen in settings]
    labels = [label[:_LONGEST_NAME].rstrip("-_.") or "run" for label in labels]
    taken = Counter(label.casefold() for label in labels)
    return [
        label if taken[label.casefold()] == 1 else f"{label}-{recipe.digest[:8]}"
        for label, recipe in zip(labels, recipes, strict=True)
    ]


def _slug(value: Any) -> str:
    """A value in letters, digits, dots and hyphens: 2:4 becomes 2of4, as in the names of the bundled recipes."""
    text = re.sub(r"(?<=\d):(?=\d)", "of", written(value))
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "empty"


def _dense_key(recipe: Recipe) -> str:
    content = recipe.to_dict()
    return json.dumps([content[key] for key in _DENSE_KEYS])
