"""Winning tickets against random tickets and random re-initialisation, in a transformer of the bundled model's size.

    python -m llmprune.eval.bench.lottery --text calibration.jsonl --heldout heldout.jsonl \
        --json lottery-testbed-cpu.json

For each seed the model is initialised anew and trained densely; the largest weights of the whole model, at each
sparsity, are the ticket. Then three models train from step `--rewind` on, on the same batches: the ticket from its
early weights, as many weights of each matrix in random places from their early weights, and the ticket from new
weights. Measured is the perplexity of held-out text. Rows of other seeds in the JSON file are kept, so that a run may
be made in parts.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmprune.devices import describe_device
from llmprune.recovery.reporting import versions
from llmprune.storage.hub import resolve_model
from llmprune.training.sparsifier import Sparsifier
from llmprune.training.sparsify import sparsify

CONTROLS = ("none", "random-ticket", "random-init")
_HELD_OUT = 64  # sequences


def windows(file: Path, length: int) -> Tensor:
    """All text of a file as sequences of tokens, [sequences, length]."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("testbed"), trust_remote_code=False)
    with file.open(encoding="utf-8") as lines:
        ids = [token for line in lines for token in tokenizer(json.loads(line)["text"], verbose=False)["input_ids"]]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def fresh(seed: int) -> Any:
    """The bundled model's architecture, newly initialised, in float32."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(resolve_model("testbed"), trust_remote_code=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def train(model: Any, batches: list[Tensor], first: int, rate: float, masks: Sparsifier | None = None) -> float:
    """Train on the batches from a step on, with the learning rate of each; returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    began = time.perf_counter()
    if masks is not None:
        masks.__enter__()
    for step in range(first, len(batches)):
        warm = min(1.0, (step + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        model(input_ids=batches[step], labels=batches[step]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if masks is not None:
        masks.__exit__(None, None, None)
    return time.perf_counter() - began


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """Of all predicted tokens."""
    losses = [model(input_ids=part, labels=part).loss.item() for part in ids.split(8)]
    return math.exp(statistics.mean(losses))


def run_seed(seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one seed."""
    texts, heldout = windows(args.text, args.length), windows(args.heldout, args.length)[:_HELD_OUT]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    order = order.repeat(math.ceil(args.steps * args.batch_size / len(order)))
    batches = [texts[order[step * args.batch_size :][: args.batch_size]] for step in range(args.steps)]
    model = fresh(seed)

    def ticket(sparsity: float, control: str) -> Sparsifier:
        schedule = {"kind": "one-shot", "stages": 1, "end": sparsity, "every": args.steps}
        return sparsify(model, {"lottery": {"rewind": args.rewind, "control": control}}, schedule, seed=seed)

    first = ticket(args.sparsities[0], "none")
    with warnings.catch_warnings():
        # The tickets go on from its state.
        warnings.filterwarnings("ignore", "sparsify ends after step")
        seconds = train(model, batches, 0, args.rate, first)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [_row(args, seed, 0.0, "dense", perplexity(model, heldout), seconds)]
    state = args.json.with_suffix(f".{seed}.safetensors")
    first.save(state)
    for sparsity in args.sparsities:
        for control in CONTROLS:
            model.load_state_dict(weights)
            masks = ticket(sparsity, control)
            masks.load(state)
            seconds = train(model, batches, args.rewind, args.rate, masks)
            assert abs(masks.sparsity - sparsity) < 1e-4
            name = "winning ticket" if control == "none" else control
            rows.append(_row(args, seed, sparsity, name, perplexity(model, heldout), seconds))
            print(rows[-1]["ticket"], sparsity, f"{rows[-1]['perplexity']:.2f}", f"{seconds:.0f} s", flush=True)
    state.unlink()
    return rows


def _row(
    args: argparse.Namespace, seed: int, sparsity: float, ticket: str, perplexity: float, seconds: float
) -> dict[str, Any]:
    return {
        "seed": seed, "sparsity": sparsity, "ticket": ticket, "perplexity": perplexity, "seconds": seconds,
        "steps": args.steps, "rewind": args.rewind, "batch_size": args.batch_size, "length": args.length,
        "rate": args.rate, "versions": versions(), "device": describe_device(torch.device("cpu")),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--heldout", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rewind", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, required=True, help="figures; rows of other seeds in it are kept")
    args = parser.parse_args(arguments)
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    for seed in args.seeds:
        rows = [row for row in rows if row["seed"] != seed] + run_seed(seed, args)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table("sparsity", "trained", "perplexity", "standard deviation", "seeds")
    for sparsity, ticket in dict.fromkeys((row["sparsity"], row["ticket"]) for row in rows):
        found = [row["perplexity"] for row in rows if (row["sparsity"], row["ticket"]) == (sparsity, ticket)]
        spread = statistics.stdev(found) if len(found) > 1 else math.nan
        table.add_row(f"{sparsity:.0%}", ticket, f"{statistics.mean(found):.2f}", f"{spread:.2f}", str(len(found)))
    Console().print(table)


if __name__ == "__main__":
    main()
