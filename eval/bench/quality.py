"""Perplexity and relative output error of every method and pattern on one model and one pair of texts.

    python -m llmprune.eval.bench.quality --calibration calibration.jsonl --heldout heldout.jsonl --json quality.json

--methods takes methods, chains such as "[wanda, swaps, refit]", and recipes, bundled ones such as best or files, whose
settings are kept apart from the pattern and the texts.

Protocol: weights and activations in float32; calibration on the first 128 packed sequences of 256 tokens, with a BOS
token in front of each document but not of each sequence (the layout `pack-bare`, so that the figures compare with
published tables of this model); perplexity on the first 400 packed sequences of 256 held-out tokens, each token
predicted from its own sequence. --samples, --length, --heldout-samples and --dtype state another. The error is the
mean relative output error, ||(W - V) X||^2 / ||W X||^2, of all matrices on 8 further calibration sequences. All
matrices of the decoder layers are pruned; the LM head stays dense.

The JSON is written after each cell. Cells that it holds already are not measured again: an interrupted table goes on,
and a larger one keeps what it has. --keep DIR saves each pruned model as DIR/METHOD-PATTERN, for llmprune eval.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
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
STAGES = ("load", "forward", "gram", "solve", "match", "statistics", "search", "write")


@dataclass(frozen=True)
class Protocol:
    """The model and the texts that all cells of a table share.

    Attributes:
        model: folder or name.
        calibration: JSON lines.
        heldout: JSON lines.
        samples: calibration sequences.
        heldout_samples: sequences that the perplexity is measured on.
        length: tokens a sequence.
        loss_weight: of the statistics, as in a recipe.
        dtype: of weights and activations.
    """

    model: str
    calibration: Path
    heldout: Path
    samples: int = 128
    heldout_samples: int = 400
    length: int = 256
    loss_weight: str = "none"
    dtype: str = "float32"

    def recipe(self) -> dict[str, Any]:
        """The part of a recipe that the protocol decides."""
        text = {"length": self.length, "order": "text", "layout": "pack-bare"}
        evaluation = {"source": str(self.heldout), "samples": self.heldout_samples, "prompts": [], **text}
        return {
            "calibration": {"source": str(self.calibration), "samples": self.samples, **text},
            "evaluation": evaluation,
            "held_back": 8,
        }

    def facts(self) -> dict[str, Any]:
        """What tells the cells of one protocol from those of another."""
        return {
            "model": Path(self.model).name,
            "calibration": f"{self.calibration.name}, {self.samples} x {self.length}",
            "heldout": f"{self.heldout.name}, {self.heldout_samples} x {self.length}",
            "loss_weight": self.loss_weight,
            "dtype": self.dtype,
        }


def measure(protocol: Protocol, method: str, pattern: str, keep: Path | None = None) -> dict[str, Any]:
    """Prune a copy of the model with weights of this dtype, and measure it; the result stays in a folder of `keep`."""
    settings = _settings(method)
    recipe = {
        **settings,
        **protocol.recipe(),
        "pattern": pattern,
        "statistics": {**settings.get("statistics", {}), "loss_weight": protocol.loss_weight},
    }
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "dense"
        folder = resolve_model(protocol.model)
        for part in (
            AutoModelForCausalLM.from_pretrained(folder, dtype=protocol.dtype, trust_remote_code=False),
            load_tokenizer(folder),
        ):
            part.save_pretrained(dense)
        name = f"{Path(method).stem}-{pattern.replace(':', 'of').replace('@', '-')}"
        report = prune(dense, recipe, (keep or Path(scratch)) / name, overwrite=True)
    evaluation = report.header["evaluation"]
    return {
        "method": method,
        "pattern": pattern,
        **protocol.facts(),
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
    """The settings of a method, a chain, a bundled recipe, or a recipe's file."""
    is_recipe = method.endswith(".yaml") or method in dict(bundled_recipes())
    if not is_recipe or method in METHODS:
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
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--heldout-samples", type=int, default=400)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--loss-weight", choices=["none", "tokens"], default="none")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, help="where to write the figures, and to find those measured before")
    parser.add_argument("--keep", type=Path, help="where to save the pruned models")
    args = parser.parse_args()
    protocol = Protocol(
        args.model,
        args.calibration,
        args.heldout,
        args.samples,
        args.heldout_samples,
        args.length,
        args.loss_weight,
        args.dtype,
    )
    cells = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    table = Table("perplexity (error)", *args.patterns, title=f"{args.model}, {protocol.facts()['heldout']}")
    for method in args.methods:
        row = [_cell(protocol, method, pattern, cells, args) for pattern in args.patterns]
        table.add_row(method, *(f"{cell['perplexity']:.2f} ({cell['error']:.4f})" for cell in row))
    Console().print(table)


def _cell(
    protocol: Protocol, method: str, pattern: str, cells: list[dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    """A cell as it was measured before, or measured now and kept in the file."""
    wanted = {"method": method, "pattern": pattern, **protocol.facts()}
    found = [cell for cell in cells if wanted.items() <= cell.items()]
    if found:
        return found[0]
    cell = measure(protocol, method, pattern, args.keep)
    print(f"{method} {pattern}: {cell['perplexity']:.2f} (dense {cell['dense_perplexity']:.2f})", flush=True)
    cells.append(cell)
    if args.json is not None:
        args.json.write_text(json.dumps(cells, indent=2) + "\n")
    return cell


if __name__ == "__main__":
    main()
