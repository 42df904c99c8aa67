"""The recipes that come with the package."""

from importlib.resources import files

from llmprune.recipe.document import parse_document


def bundled_recipes() -> list[tuple[str, str]]:
    """List the recipes that come with the package as (name, description), sorted by name."""
    return [
        (name, str(parse_document(text, name).data.get("description", ""))) for name, text in recipe_texts().items()
    ]


def recipe_texts() -> dict[str, str]:
    """The text of each bundled recipe."""
    entries = sorted(files("llmprune.recipes").iterdir(), key=lambda entry: entry.name.removesuffix(".yaml"))
    return {
        entry.name.removesuffix(".yaml"): entry.read_text("utf-8") for entry in entries if entry.name.endswith(".yaml")
    }
