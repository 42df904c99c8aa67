"""The results of every bundled recipe of `llmprune train` on the bundled model.

    OMP_NUM_THREADS=1 python -m llmprune.eval.bench.training --text calibration.jsonl --heldout heldout.jsonl \
        --folder out/training --json eval/bench/results/training-testbed-cpu.json --write

Protocol: the recipe as it is, with 80 optimizer steps of 8 sequences of 128 tokens, shared out evenly among its stages;
lottery tickets take one round, with 80 dense steps before it and 60 in it, and RigL moves zeros every 10 steps. The
perplexity of 64 held-out sequences is measured. Movement rules fine-tune the classifier of `eval.bench.movement`, with
the stages, batches and learning rate of its figures, 420 steps in all, and accuracy is measured.

--write puts the figures into the recipes, as the comment lines that start with "# Testbed:" and "# Made by".
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmprune.eval.bench.movement import make_classifier, make_texts
from llmprune.eval.bench.recipes import RECIPES, write_lines
from llmprune.recipe.bundled import bundled_recipes
from llmprune.storage.files import write_json
from llmprune.text.tokens import TextSpec
from llmprune.training.recipe import TrainRecipe, load_train_recipe
from llmprune.training.rules import Lottery, RigL
from llmprune.training.train import train
from llmprune.units import format_change

STEPS, LENGTH, BATCH = 80, 128, 8
# Of the classifier.
PASSAGE, PASSAGES, RATE, EVERY, DENSE = 32, 16, 1e-3, 8, 100


def overrides(recipe: TrainRecipe) -> list[str]:
    """How a recipe differs from its file: the steps of its stages, and its batches."""
    if isinstance(recipe.rule, Lottery):
        return ["schedule.stages=1", f"schedule.every={STEPS}", f"training.batch_size={BATCH}"]
    if recipe.rule.score_rate:
        steps = [f"schedule.every={EVERY}", f"schedule.dense={DENSE}"]
        return [*steps, f"training.batch_size={PASSAGES}", f"training.learning_rate={RATE}"]
    moves = ["rule.rigl.interval=10"] if isinstance(recipe.rule, RigL) else []
    return [f"schedule.every={STEPS // recipe.schedule.stages}", f"training.batch_size={BATCH}", *moves]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train once by a recipe."""
    recipe = load_train_recipe(name)
    changes = overrides(recipe)
    model, text, heldout = (
        "testbed",
        TextSpec(str(args.text), length=LENGTH),
        TextSpec(str(args.heldout), samples=64, length=LENGTH),
    )
    if recipe.rule.score_rate:
        model = str(make_classifier(args.folder / "classifier", 0))
        text = TextSpec(str(args.folder / "train.jsonl"), length=PASSAGE)
        heldout = TextSpec(str(args.folder / "test.jsonl"), length=PASSAGE)
    report = train(model, args.folder / name, text, name, overrides=changes, evaluation=heldout, overwrite=True)
    training, header = report.header["training"], report.header
    return {
        "recipe": name,
        "overrides": changes,
        "measure": training["measure"],
        "dense": training["before"],
        "trained": training["after"],
        "from_scratch": recipe.from_scratch,
        "steps": training["steps"],
        "sparsity": training["curve"][-1]["sparsity"],
        "seconds": header["seconds"]["total"],
        "versions": header["version"],
        "device": header["device"],
    }


def comment(row: dict[str, Any]) -> str:
    """The comment lines of a recipe with its results.

    Args:
        row: what `measure` returned.
    """
    quality = f"{row['measure']} {row['trained']:.2f}"
    if row["measure"] == "accuracy":
        quality = f"accuracy {row['trained']:.1%} in telling passages from shuffled ones,"
    elif not row["from_scratch"]:
        quality = f"perplexity {format_change(row['dense'], row['trained'])}"
    scratch = " from scratch" if row["from_scratch"] else ""
    scratch += " in one round" if "schedule.stages=1" in row["overrides"] else ""
    spent = f"after {row['steps']} steps{scratch}; {row['sparsity']:.1%} sparsity; {row['seconds']:.0f} s"
    made = f"# Made by python -m llmprune.eval.bench.training, which states the protocol, on {row['device']}."
    return f"# Testbed: {quality} {spent}.\n{made}"


def main(arguments: list[str] | None = None) -> None:
    """Run the recipes, print the table, write the JSON and the comments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--heldout", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--folder", type=Path, required=True, help="for labelled texts and checkpoints")
    parser.add_argument("--recipes", nargs="+", default=[name for name, _ in bundled_recipes("train")])
    parser.add_argument("--json", type=Path, required=True, help="result file; figures of other recipes in it are kept")
    parser.add_argument("--write", action="store_true", help="also write them into the recipes")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    make_texts(args.text, args.folder / "train.jsonl", 4000, seed=1)
    make_texts(args.heldout, args.folder / "test.jsonl", 300, seed=2)
    known = json.loads(args.json.read_text("utf-8")) if args.json.exists() else []
    rows = {row["recipe"]: row for row in known}
    for name in args.recipes:
        rows[name] = measure(name, args)
        print(f"{name}: {comment(rows[name]).splitlines()[0].removeprefix('# Testbed: ')}", flush=True)
        write_json(args.json, [rows[one] for one in sorted(rows)])
        if args.write:
            write_lines(RECIPES / "training" / f"{name}.yaml", comment(rows[name]))
    table = Table("recipe", "measure", "dense", "trained", "sparsity", "steps", "s")
    for name in sorted(rows):
        row = rows[name]
        figures = f"{row['dense']:.3f}", f"{row['trained']:.3f}", f"{row['sparsity']:.1%}"
        table.add_row(name, row["measure"], *figures, str(row["steps"]), f"{row['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
