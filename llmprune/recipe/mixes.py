"""Lists of texts under `calibration` and `evaluation`, brought into the form that is checked.

calibration: [{source: a.jsonl, share: 0.75}, {source: self, length: 512}]      as it may be written
calibration: {length: 512, mix: [{source: a.jsonl, share: 0.75}, {source: self, share: 0.25}]}      as it is read
"""

from fractions import Fraction
from typing import Any

from llmprune.errors import RecipeError
from llmprune.recipe.document import Document, KeyPath

_KEYS = ("calibration", "evaluation")


def spread_mixes(document: Document) -> None:
    """Bring every list of texts under `mix`, with the length and the number of all sequences beside it, in place.

    Shares that are left out divide what the others leave of 1. Instead of shares, every text may have its own number of
    samples.

    Raises:
        RecipeError: lengths differ, only some texts have samples or the mix has them as well, or nothing is left for a
            text without a share.
    """
    for key in _KEYS:
        section = document.data.get(key)
        if isinstance(section, list):
            section = document.data[key] = {"mix": section}
            document.places = {
                (key, "mix", *path[1:]) if path[:1] == (key,) and path[1:] else path: place
                for path, place in document.places.items()
            }
        if isinstance(section, dict) and isinstance(section.get("mix"), list):
            # What is no section is refused with all other values.
            parts = [(number, part) for number, part in enumerate(section["mix"]) if isinstance(part, dict)]
            _one_length(document, key, section, parts)
            _samples_as_shares(document, key, section, parts)
            _complete_shares(document, key, parts)


def _one_length(document: Document, key: str, section: dict[str, Any], parts: list[tuple[int, dict[str, Any]]]) -> None:
    for number, part in parts:
        if part.get("length") is not None:
            path: KeyPath = (key, "mix", number, "length")
            if section.get("length") not in (None, part["length"]):
                raise RecipeError(
                    f"{document.place(path)}: lengths {part['length']} and {section['length']} in {key}",
                    expected="sequences of one length",
                    fix="give the length once",
                )
            section["length"] = part["length"]
            document.places.setdefault((key, "length"), document.place(path))
        part.pop("length", None)


def _samples_as_shares(
    document: Document, key: str, section: dict[str, Any], parts: list[tuple[int, dict[str, Any]]]
) -> None:
    given = {number: part.pop("samples") for number, part in parts if part.get("samples") is not None}
    for _, part in parts:
        part.pop("samples", None)
    if not given:
        return
    place = document.place((key, "mix", next(iter(given)), "samples"))
    whole = all(type(count) is int and count > 0 for count in given.values())
    shares = any("share" in part for _, part in parts)
    if len(given) < len(section["mix"]) or shares or section.get("samples") is not None or not whole:
        raise RecipeError(
            f"{place}: samples of a text in a mix (in {key})",
            expected="shares and the number of all sequences, or a number of at least 1 for every text and no share",
            fix=f"write {key}: {{samples: 128, mix: [{{source: ..., share: 0.5}}, ...]}}",
        )
    section["samples"] = sum(given.values())
    document.places.setdefault((key, "samples"), place)
    for number, part in parts:
        part["share"] = given[number]


def _complete_shares(document: Document, key: str, parts: list[tuple[int, dict[str, Any]]]) -> None:
    given = [part["share"] for _, part in parts if type(part.get("share")) in (int, float)]
    without = [number for number, part in parts if "share" not in part]
    if not given or not without:
        return
    rest = 1 - sum(Fraction(str(share)) for share in given)
    if rest <= 0:
        raise RecipeError(
            f"{document.place((key, 'mix', without[0]))}: nothing is left for a text without a share (in {key})",
            expected="shares below 1 in sum, or a share for every text",
            fix="give this text a share",
        )
    for number, part in parts:
        if number in without:
            part["share"] = float(rest / len(without))
