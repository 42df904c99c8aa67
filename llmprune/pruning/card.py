"""The model card of a pruned checkpoint: README.md with the Hub's metadata."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM

from llmprune.models.boundary import auto_class_for, read_stock_config
from llmprune.pages.labels import repeating_command
from llmprune.recipe.recipe import Recipe
from llmprune.storage.files import read_json, write_text
from llmprune.storage.packed_config import NOTICE_KEY
from llmprune.storage.report import Report

CARD_NAME = "README.md"

# What loads models with other towers, such as one for images, whose own class AutoModelForCausalLM does not know.
_WRAPPER = "AutoModelForImageTextToText"


def write_card(folder: Path, model: str, recipe: Recipe, report: Report) -> None:
    """Write README.md: what was pruned, how, and the effect on perplexity.

    Args:
        folder: the pruned checkpoint.
        model: the model that was pruned; a hub id becomes `base_model`, of a local folder only the name is used.
        recipe: as it was run.
        report: of the run.
    """
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not Path(model).exists()
    methods = {row.method for row in report.rows} | {row.method for row in report.structures}
    data = ModelCardData(
        base_model=model if hub_id else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if _auto_class(folder) == _WRAPPER else "text-generation",
        tags=["llmprune", "pruned", *(["sparse"] if report.rows else []), *sorted(methods)],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(folder, model, recipe, report)}")
    write_text(folder / CARD_NAME, str(card))


def _body(folder: Path, model: str, recipe: Recipe, report: Report) -> str:
    name = _plain(Path(model).name)
    lines = [
        f"# {name}, pruned",
        "",
        f"{name}, {_what(report)}, one decoder layer at a time, by llmprune {report.header['version']['llmprune']}.",
        _loading(folder, ours=_needs_us(folder)),
        "",
        *([_plain(dropped), ""] if (dropped := report.header.get("draft_head")) else []),
        *_table(report),
        "## How it was made",
        "",
        *_fenced("yaml", recipe.to_yaml().rstrip()),
        "",
        "`report.json` has a row for every matrix. To reproduce the run with `recipe.yaml`:",
        "",
        *_fenced("bash", repeating_command(model)),
        "",
    ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A name as Markdown that shows it on one line, whatever it holds."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return re.sub(r"[\\`*_{}\[\]#!|~@$]|:(?=//)|^[-+]|(?<=^\d)[.)]", r"\\\g<0>", html.escape(line, quote=False))


def _code(text: str) -> str:
    """Text as inline code on one line: its fence is longer than any run of backticks in it."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def _fenced(language: str, text: str) -> list[str]:
    """Text as the lines of a code block."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def update_card(folder: Path) -> None:
    """Update the card of a checkpoint that was packed or unpacked to say how it loads now; nothing else changes."""
    card = folder / CARD_NAME
    if card.is_file():
        ours, text = _needs_us(folder), card.read_text(encoding="utf-8")
        write_text(card, text.replace(_loading(folder, ours=not ours), _loading(folder, ours=ours)))


def _loading(folder: Path, *, ours: bool) -> str:
    how = " where llmprune is installed, after `import llmprune`" if ours else ", like the original"
    return f"It loads with `{_auto_class(folder)}.from_pretrained`{how}."


def _auto_class(folder: Path) -> str:
    """The class of transformers that loads the checkpoint."""
    found = auto_class_for(read_stock_config(folder)) if (folder / "config.json").exists() else None
    return (found or AutoModelForCausalLM).__name__


def _needs_us(folder: Path) -> bool:
    """Whether stock transformers cannot load the checkpoint: packed weights, or layers of different sizes."""
    config = folder / "config.json"
    return config.exists() and NOTICE_KEY in read_json(config)


def _what(report: Report) -> str:
    """What was removed, in words."""
    parts = []
    extent = report.header.get("extent")
    if extent:
        parts += [f"with {left}" for left in report.left]
        share = extent["pruned"]["parameters"] / extent["dense"]["parameters"]
        parts.append(f"{share:.1%} of its parameters in total")
    if report.rows:
        patterns = ", ".join(sorted({f"{row.pattern} by {row.method}" for row in report.rows}))
        parts.append(
            f"with {report.sparsity:.1%} of the weights of {len(report.rows)} matrices set to zero ({patterns})"
        )
    return ", ".join(parts)


def _table(report: Report) -> list[str]:
    evaluation = report.header.get("evaluation")
    if not evaluation:
        return []
    dense = evaluation["dense"]
    divergence = "not finite" if evaluation["kl_divergence"] is None else f"{evaluation['kl_divergence']:.4f}"
    return [
        "| | dense | pruned |",
        "|---|---|---|",
        f"| perplexity | {report.dense_perplexity:.3f} | {report.pruned_perplexity:.3f} |",
        f"| KL divergence from the dense model (nats/token) | 0 | {divergence} |",
        f"| top-1 agreement with the dense model | 100% | {evaluation['agreement']:.1%} |",
        "",
        f"On {dense['predicted_tokens']} tokens of text {_origin(dense['text'])}, in sequences of {dense['length']}.",
        "",
    ]


def _origin(text: Mapping[str, Any]) -> str:
    """Where the text of the evaluation comes from; of a mix, all its texts."""
    if "mix" in text:
        return "; ".join(_origin(part) for part in text["mix"])
    if text["source"] != "self":
        return f"from {_code(text['source'])}"
    continued = f", continuing {_code(text['continues'])}" if text.get("continues") else ""
    return f"generated by the dense model{continued}"
