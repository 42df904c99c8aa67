"""A recipe and its figures in a few words."""

import math
from collections.abc import Mapping
from typing import Any


def short_recipe(recipe: Mapping[str, Any]) -> str:
    """What a recipe does, without its knobs.

    Args:
        recipe: as a report holds it.

    Example:
        >>> short_recipe({"structures": {"ffn": {"remove": 0.25}}, "pattern": "2:4", "method": {"sparsegpt": {}}})
        'ffn -25%, sparsegpt 2:4'
    """
    structures = {name: section for name, section in (recipe.get("structures") or {}).items() if section}
    parts = [f"{name} -{_amount(section['remove'])}" for name, section in structures.items() if section.get("remove")]
    if method := recipe.get("method"):
        parts.append(f"{next(iter(method))} {recipe.get('pattern')}")
    if rules := recipe.get("rules"):
        parts.append(f"{len(rules)} rule{'s' if len(rules) > 1 else ''}")
    if recipe.get("format", "dense") != "dense":
        parts.append(f"packed as {recipe['format']}")
    return ", ".join(parts) or "nothing removed"


def perplexity(value: float | None) -> str:
    """A perplexity, or why there is none."""
    return "not measured" if value is None else "infinite" if math.isinf(value) else f"{value:.2f}"


def divergence(value: float | None) -> str:
    """A divergence in nats; null in a report means that it is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def text_line(evaluated: Mapping[str, Any]) -> str:
    """On what a perplexity of a report was measured."""
    source = evaluated["text"]["source"]
    text = "text that the dense model wrote" if source == "self" else source
    return f"{evaluated['predicted_tokens']:,} tokens of {text}, in chunks of {evaluated['length']:,}"


def _amount(remove: float) -> str:
    return str(remove) if isinstance(remove, int) else f"{remove:.0%}"
