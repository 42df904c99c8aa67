"""The recipes that come with the package, and those in files."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from llmprune.errors import RecipeError
from llmprune.paths import user_path
from llmprune.recipe.document import Document, did_you_mean, one_of, parse_document

# What reads a recipe, each with keys of its own; none come with the package for `llmprune recover`.
Command = Literal["prune", "train", "recover"]
_FOLDERS: dict[Command, str] = {"prune": "", "train": "training"}


def bundled_recipes(command: Command = "prune") -> list[tuple[str, str]]:
    """List the recipes of a command that come with the package as (name, description), sorted by name."""
    return [
        (name, str(parse_document(text, name).data.get("description", "")))
        for name, text in recipe_texts(command).items()
    ]


def recipe_texts(command: Command = "prune") -> dict[str, str]:
    """The text of each bundled recipe of a command, sorted by name."""
    if command not in _FOLDERS:
        return {}
    place = files("llmprune.recipes")
    folder = place / _FOLDERS[command] if _FOLDERS[command] else place
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return dict(sorted((entry.name.removesuffix(".yaml"), entry.read_text("utf-8")) for entry in entries))


def open_recipe(recipe: str | Path, command: Command) -> Document:
    """Read a bundled recipe by its name, which takes precedence over a file of that name, or a YAML file.

    Raises:
        RecipeError: there is neither, it is a recipe of another command, or it cannot be read.
    """
    bundled = recipe_texts(command)
    if isinstance(recipe, str) and recipe in bundled:
        return parse_document(bundled[recipe], f"{recipe}.yaml")
    try:
        return parse_document(user_path(recipe, RecipeError).read_text("utf-8"), str(recipe))
    except FileNotFoundError as error:
        for other in _FOLDERS:
            if other != command and str(recipe) in recipe_texts(other):
                fix = f"run llmprune {other} --recipe {recipe}"
                raise RecipeError(f"{recipe} is a recipe for llmprune {other}", fix=fix) from error
        hint = did_you_mean(Path(recipe).name.removesuffix(".yaml"), bundled)
        expected = f"a YAML file, or {one_of(bundled)}" if bundled else "a YAML file"
        raise RecipeError(f"no recipe {str(recipe)!r}{hint}", expected=expected) from error
    except (OSError, UnicodeError) as error:
        fix = "check the path, or save the file as UTF-8 text"
        raise RecipeError(f"{recipe} cannot be read: {error}", expected="a YAML file in UTF-8", fix=fix) from error
