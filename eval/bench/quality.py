"""Perplexity and relative output error of every method and pattern on one model and one pair of texts.

    python -m llmprune.eval.bench.quality --calibration calibration.jsonl --heldout heldout.jsonl --json quality.json

--methods takes methods, chains such as "[wanda, swaps, refit]", and bundled recipes such as best, whose settings are
kept apart from the pattern and the texts.

Protocol: weights and activations in float32; calibration on the first 128 packed sequences of 256 tokens, with a BOS
token in front of each document but not of each sequence (the layout `pack-bare`, so that the figures compare with
published tables of this model); perplexity on the first 400 packed sequences of 256 held-out tokens, each token
predicted from its own sequence. The error is the mean relative output error, ||(W - V) X||^2 / ||W X||^2, of all
matrices on 8 further calibration sequences. All matrices of the decoder layers are pruned; the LM head stays dense.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from llmprune.methods import METHODS
from llmprune.pruning.pipeline import prune
from llmprune.recipe.bundled import bundled_recipes
from llmprune.recipe.recipe import load_recipe
from llmprune.storage.hub import resolve_model
from llmprune.text.loading import load_tokenizer

PATTERNS = ("0.5", "0.6", "0.7", "2:4")
# What pruning takes, without texts and perplexities.
STAGES = ("load", "forward", "gram", "solve", "match")


def measure(
    model: str, method: str, pattern: str, calibration: Path, heldout: Path, loss_weight: str = "none"
) -> dict[str, float | str]:
    """Prune the model in memory, in float32, and measure it."""
    folder = resolve_model(model)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False)
    text = {"length": 256, "order": "text", "layout": "pack-bare"}
    recipe = {
        **_settings(method),
        "pattern": pattern,
        "calibration": {"source": str(calibration), "samples": 128, **text},
        "evaluation": {"source": str(heldout), "samples": 400, "prompts": [], **text},
        "held_back": 8,
        "statistics": {**_settings(method).get("statistics", {}), "loss_weight": loss_weight},
    }
    report = prune(dense, recipe, tokenizer=load_tokenizer(folder))
    evaluation = report.header["evaluation"]
    return {
        "method": method,
        "pattern": pattern,
        "loss_weight": loss_weight,
        "dense_perplexity": evaluation["dense"]["perplexity"],
        "perplexity": evaluation["pruned"]["perplexity"],
        "kl_divergence": evaluation["kl_divergence"],
        "error": report.mean_error or 0.0,
        "sparsity": report.sparsity,
        "seconds": sum(report.header["seconds"].get(stage, 0.0) for stage in STAGES),
        "versions": report.header["version"],
        "device": report.header["device"],
    }


def _settings(method: str) -> dict[str, Any]:
    """The settings of a method, a chain, or a bundled recipe."""
    bundled = dict(bundled_recipes())
    if method not in bundled or method in METHODS:
        return {"method": yaml.safe_load(method), "batch_size": 16}
    return {key: value for key, value in load_recipe(method).to_dict().items() if key not in ("description", "rules")}


def main() -> None:
    """Measure the grid, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--heldout", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--loss-weight", choices=["none", "tokens"], default="none")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    cells = {}
    for method in args.methods:
        for pattern in args.patterns:
            cells[method, pattern] = measure(
                args.model, method, pattern, args.calibration, args.heldout, args.loss_weight
            )
            print(f"{method} {pattern}: {cells[method, pattern]['perplexity']:.2f}", flush=True)
    dense = next(iter(cells.values()))["dense_perplexity"]
    table = Table("perplexity (error)", *args.patterns, title=f"{args.model}, dense {dense:.2f}")
    for method in args.methods:
        row = [cells[method, pattern] for pattern in args.patterns]
        table.add_row(method, *(f"{cell['perplexity']:.2f} ({cell['error']:.4f})" for cell in row))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(list(cells.values()), indent=2) + "\n")


if __name__ == "__main__":
    main()
