"""The model card of a pruned checkpoint: README.md with the Hub's metadata."""

import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from llmprune.checkpoint import write_text
from llmprune.recipe import Recipe
from llmprune.report import Report

CARD_NAME = "README.md"


def write_card(folder: Path, model: str, recipe: Recipe, report: Report) -> None:
    """Write README.md: what was pruned, how, and what it cost in perplexity.

    Args:
        folder: the pruned checkpoint.
        model: what was pruned: a hub id becomes `base_model`, a local folder stays a name.
        recipe: as it was run.
        report: what came out.
    """
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not Path(model).exists()
    data = ModelCardData(
        base_model=model if hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llmprune", "pruned", "sparse", *sorted({row.method for row in report.rows})],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(model, recipe, report)}")
    write_text(folder / CARD_NAME, str(card))


def _body(model: str, recipe: Recipe, report: Report) -> str:
    patterns = ", ".join(sorted({f"{row.pattern} by {row.method}" for row in report.rows}))
    name = Path(model).name
    lines = [
        f"# {name}, pruned",
        "",
        f"{name} with {report.sparsity:.1%} of the weights of {len(report.rows)} matrices set to zero ({patterns}), "
        f"one decoder layer at a time, by llmprune {report.header['version']['llmprune']}.",
        "It loads with `AutoModelForCausalLM.from_pretrained`, like the original.",
        "",
        *_table(report),
        "## How it was made",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        "`report.json` holds a row for every matrix; `recipe.yaml` repeats the run:",
        "",
        "```bash",
        f"llmprune prune {shlex.quote(model)} --recipe recipe.yaml --output pruned",
        "```",
        "",
    ]
    return "\n".join(lines)


def _table(report: Report) -> list[str]:
    evaluation = report.header.get("evaluation")
    if not evaluation:
        return []
    dense = evaluation["dense"]
    text = dense["text"]["source"]
    divergence = "not finite" if evaluation["kl_divergence"] is None else f"{evaluation['kl_divergence']:.4f}"
    return [
        "| | dense | pruned |",
        "|---|---|---|",
        f"| perplexity | {report.dense_perplexity:.3f} | {report.pruned_perplexity:.3f} |",
        f"| KL divergence to the dense model (nats a token) | 0 | {divergence} |",
        f"| same most likely token | 100 % | {evaluation['agreement']:.1%} |",
        "",
        f"On {dense['predicted_tokens']} tokens of text "
        + ("that the dense model wrote itself" if text == "self" else f"from `{text}`")
        + f", in chunks of {dense['length']}.",
        "",
    ]
