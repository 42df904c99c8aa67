"""The results of every bundled recipe on the bundled model.

    OMP_NUM_THREADS=1 python -m llmprune.eval.bench.recipes --json eval/bench/results/recipes-testbed-cpu.json --write

Protocol: the recipe as it is, but with sequences of 256 tokens, since the bundled model has fewer positions than the
default length. The text is self-generated, with different seeds for the statistics and the perplexities. CPU time is
summed over all threads while the layers are rotated and pruned: reading, forward passes, statistics, solving and
writing, but not text and perplexities. Other programs on the machine increase it by up to a half; eval/bench/prune.py
measures it without them.

--write puts the figures into the recipes, as the comment lines that start with "# Testbed:" and "# Made by".
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmprune.devices import describe_device, resolve_device
from llmprune.errors import ModelError, PatternError, RecipeError
from llmprune.progress import Progress
from llmprune.pruning.pipeline import prune
from llmprune.recipe.bundled import bundled_recipes
from llmprune.storage.files import write_json
from llmprune.units import format_change

# Stages of a rotation, which comes before the layers are pruned.
_BEFORE = ("statistics", "rotation")

PROTOCOL = ("calibration.samples=128", "calibration.length=256", "evaluation.length=256")
RECIPES = Path(__file__).parents[2] / "recipes"


class ProcessorTime:
    """Watches a run, and sums up the CPU time while layers are rotated and pruned.

    Attributes:
        seconds: CPU time so far, of all threads.
    """

    def __init__(self) -> None:
        self.seconds = self._since = 0.0
        self._pruning = False

    def __call__(self, progress: Progress) -> None:
        """Note one step."""
        now = time.process_time()
        if self._pruning:
            self.seconds += now - self._since
        prunes = progress.stage == "pruning" and progress.layer < progress.layers
        self._pruning, self._since = prunes or progress.stage in _BEFORE, now


def measure(name: str) -> dict[str, Any]:
    """Run one recipe; if it does not apply to the model, the result is the reason."""
    clock = ProcessorTime()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = prune("testbed", name, Path(folder) / "pruned", overrides=PROTOCOL, watch=clock)
        except (ModelError, PatternError, RecipeError) as error:
            return {"recipe": name, "refused": error.what, "device": describe_device(resolve_device("auto"))}
    evaluation, extent = report.header["evaluation"], report.header.get("extent")
    parameters = {"parameters": extent["pruned"]["parameters"] / extent["dense"]["parameters"]} if extent else {}
    return {
        "recipe": name,
        **parameters,
        "dense_perplexity": report.dense_perplexity,
        "perplexity": report.pruned_perplexity,
        "kl_divergence": evaluation["kl_divergence"],
        "agreement": evaluation["agreement"],
        "sparsity": report.sparsity,
        "error": report.mean_error,
        "samples": report.header["texts"]["calibration"]["samples"],
        "evaluation_samples": evaluation["dense"]["samples"],
        "processor_seconds": clock.seconds,
        "tokens": report.header["tokens"],
        "versions": report.header["version"],
        "device": report.header["device"],
    }


def comment(row: dict[str, Any]) -> str:
    """The comment lines of a recipe with its results.

    Args:
        row: what `measure` returned.
    """
    made = f"# Made by python -m llmprune.eval.bench.recipes, which states the protocol, on {row['device']}."
    if "refused" in row:
        return f"# Testbed: not applicable ({row['refused']}).\n{made}"
    left = [f"{row['parameters']:.1%} of the parameters"] if "parameters" in row else []
    left += [f"{row['sparsity']:.1%} sparsity"] if row["sparsity"] else []
    return (
        f"# Testbed: perplexity {format_change(row['dense_perplexity'], row['perplexity'])}; KL divergence "
        f"{row['kl_divergence']:.4f} nats/token; {', '.join(left)}; {row['processor_seconds']:.1f} s of CPU time."
        f"\n{made}"
    )


def write_comment(name: str, row: dict[str, Any]) -> None:
    """Write a recipe's figures into its file."""
    write_lines(RECIPES / f"{name}.yaml", comment(row))


def write_lines(file: Path, lines: str) -> None:
    """Write comment lines with figures into a recipe, in place of old ones or below the other comments at its top."""
    text = re.sub(r"^# (Testbed:|Made by) .*\n", "", file.read_text("utf-8"), flags=re.MULTILINE)
    head = re.match(r"(description:.*\n)?(#.*\n)*", text)
    assert head is not None
    file.write_text(f"{head[0]}{lines}\n{text[head.end() :]}", "utf-8")


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures, one recipe per row."""
    shown = Table("recipe", "dense", "pruned", "KL", "top-1", "sparsity", "parameters", "error", "CPU s")
    for row in rows:
        if "refused" in row:
            shown.add_row(row["recipe"], row["refused"])
            continue
        numbers = f"{row['kl_divergence']:.4f}", f"{row['agreement']:.1%}", f"{row['sparsity']:.1%}"
        perplexities = f"{row['dense_perplexity']:.3f}", f"{row['perplexity']:.3f}"
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        left = f"{row.get('parameters', 1.0):.1%}"
        shown.add_row(row["recipe"], *perplexities, *numbers, left, error, f"{row['processor_seconds']:.1f}")
    return shown


def main() -> None:
    """Run the recipes, print the table, write the JSON and the comments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[name for name, _ in bundled_recipes()])
    parser.add_argument("--json", type=Path, help="result file; figures of other recipes in it are kept")
    parser.add_argument("--write", action="store_true", help="also write them into the recipes")
    args = parser.parse_args()
    known = json.loads(args.json.read_text("utf-8")) if args.json and args.json.exists() else []
    rows = {row["recipe"]: row for row in known}
    for name in args.recipes:
        rows[name] = measure(name)
        print(f"{name}: {comment(rows[name]).splitlines()[0].removeprefix('# Testbed: ')}", flush=True)
        if args.json:
            write_json(args.json, [rows[name] for name in sorted(rows)])
        if args.write:
            write_comment(name, rows[name])
    Console().print(table([rows[name] for name in sorted(rows)]))


if __name__ == "__main__":
    main()
