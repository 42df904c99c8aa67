"""Movement against magnitude pruning while a classifier is fine-tuned.

    python -m llmprune.eval.bench.movement --text calibration.jsonl --heldout heldout.jsonl --folder out/movement \
        --json movement-testbed-cpu.json
    python -m llmprune.eval.bench.movement --text calibration.jsonl --heldout heldout.jsonl --folder out/stages \
        --rules magnitude --sparsities 0.95 --seeds 0 --kind iterative --stages 10 --every 32 --cycle stage \
        --held-back 256 --json stages-classifier-cpu.json

The classifier is the bundled model with a new head. It is fine-tuned to tell passages from passages whose words were
shuffled; both files of labelled texts are made from the given ones, in the folder. Each rule has one dense stage,
then stages along a schedule. Measured is the accuracy on passages from the held-out text, and, for the curve, after
each stage on passages that are held back. The second command is the experiment in ten stages, each of which prunes a
quarter of the weights that are left and trains. Rows of other rules, sparsities and seeds in the JSON file are kept, so
that a run may be made in parts; those of other stages are dropped.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmprune.models.skeleton import quiet_transformers
from llmprune.storage.hub import resolve_model
from llmprune.text.tokens import TextSpec
from llmprune.training.train import train

# Of a passage.
WORDS = 20


def make_texts(source: Path, target: Path, count: int, seed: int) -> None:
    """Write labelled passages: half of them as they are (label 0), half with their words shuffled (label 1)."""
    draw = random.Random(seed)
    with source.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"].split() for line in lines]
    documents = [words for words in documents if len(words) > 2 * WORDS]
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = draw.choice(documents)
            start = draw.randrange(len(words) - WORDS)
            passage, label = words[start : start + WORDS], number % 2
            if label:
                draw.shuffle(passage)
            file.write(json.dumps({"text": " ".join(passage), "label": label}) + "\n")


def make_classifier(folder: Path, seed: int) -> Path:
    """Save the bundled model with a new head of two labels."""
    import torch

    torch.manual_seed(seed)
    testbed = resolve_model("testbed")
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            testbed, num_labels=2, dtype=torch.float32, trust_remote_code=False
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(testbed, trust_remote_code=False).save_pretrained(folder)
    return folder


def measure(rule: str, sparsity: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune once, and measure."""
    model = make_classifier(args.folder / f"classifier-{seed}", seed)
    recipe = {
        "rule": rule,
        "schedule": {
            "kind": args.kind, "stages": args.stages, "end": sparsity, "every": args.every, "dense": args.dense,
        },
        "training": {
            "learning_rate": args.rate, "batch_size": args.batch_size, "held_back": args.held_back, "seed": seed,
            "cycle": args.cycle,
        },
    }  # fmt: skip
    output, text = (
        args.folder / f"{rule}-{sparsity}-{seed}",
        TextSpec(str(args.folder / "train.jsonl"), length=args.length),
    )
    report = train(model, output, text, recipe, evaluation=str(args.folder / "test.jsonl"), overwrite=True)
    training = report.header["training"]
    return {
        "rule": rule, "sparsity": sparsity, "seed": seed, "accuracy": training["after"],
        "examples": training["examples"], "curve": training["curve"], "recipe": training["recipe"],
        "zeros": training["zeros"], "seconds": report.header["seconds"], "versions": report.header["version"],
        "device": report.header["device"],
    }  # fmt: skip


def _stays(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a row is another run of the same protocol."""
    keys = ("kind", "stages", "every", "dense")
    same = all(old["recipe"]["schedule"][key] == new["recipe"]["schedule"][key] for key in keys)
    return same and any(old[key] != new[key] for key in ("rule", "sparsity", "seed"))


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--heldout", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--folder", type=Path, required=True, help="for labelled texts and checkpoints")
    parser.add_argument("--rules", nargs="+", default=["magnitude", "movement"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.85, 0.95])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kind", default="cubic", help="of the schedule")
    parser.add_argument("--stages", type=int, default=40, help="after the dense one")
    parser.add_argument("--every", type=int, default=8, help="steps of a stage")
    parser.add_argument("--dense", type=int, default=100, help="steps of the dense stage")
    parser.add_argument("--cycle", default="run", help="over which the learning rate falls: run or stage")
    parser.add_argument("--held-back", type=int, default=64, help="examples that are scored after each stage")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--examples", type=int, default=4000, help="to train on")
    parser.add_argument("--tested", type=int, default=300, help="examples to measure on")
    parser.add_argument("--json", type=Path, required=True, help="figures; other rows in it are kept")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    make_texts(args.text, args.folder / "train.jsonl", args.examples, seed=1)
    make_texts(args.heldout, args.folder / "test.jsonl", args.tested, seed=2)
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    for seed in args.seeds:
        for sparsity in args.sparsities:
            for rule in args.rules:
                key = (rule, sparsity, seed)
                row = measure(*key, args)
                rows = [one for one in rows if _stays(one, row)] + [row]
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
                print(*key, f"{row['accuracy']:.3f}", f"{row['seconds']['total']:.0f} s", flush=True)
    table = Table("sparsity", "rule", "accuracy", "standard deviation", "seeds")
    for sparsity, rule in sorted({(row["sparsity"], row["rule"]) for row in rows}):
        found = [row["accuracy"] for row in rows if (row["sparsity"], row["rule"]) == (sparsity, rule)]
        spread = f"{statistics.stdev(found):.1%}" if len(found) > 1 else ""
        table.add_row(f"{sparsity:.0%}", rule, f"{statistics.mean(found):.1%}", spread, str(len(found)))
    Console().print(table)


if __name__ == "__main__":
    main()
