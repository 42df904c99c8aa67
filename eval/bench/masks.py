"""What masks cost in training: seconds of a step of the bundled model with and without them, in one run.

    python -m llmprune.eval.bench.masks --json masks-testbed-cpu.json

Every way takes turns, a step each in every round, on its own copy of the model and its own AdamW, so that other
programs on the machine slow all of them alike. Before that, each way's zeros are counted: half of the weights, and
none without masks.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from llmprune.devices import describe_device
from llmprune.recovery.keeping import keep_zeros
from llmprune.recovery.reporting import versions
from llmprune.storage.hub import resolve_model
from llmprune.training.sparsify import sparsify
from llmprune.training.targets import find_targets

Step = Callable[[], None]


def load() -> Any:
    """The bundled model in float32."""
    return AutoModelForCausalLM.from_pretrained(resolve_model("testbed"), dtype=torch.float32, trust_remote_code=False)


def halved(model: Any) -> Any:
    """The same with the smaller half of each matrix zero."""
    with torch.no_grad():
        for target in find_targets(model):
            weight = target.parameter
            weight[weight.abs() < weight.abs().median()] = 0
    return model


def ways(stack: contextlib.ExitStack) -> dict[str, tuple[Any, Any]]:
    """Each way's model and its masks, if it has any."""
    found: dict[str, tuple[Any, Any]] = {"none": (halved(load()), None)}
    kept = halved(load())
    found["keep_zeros"] = (kept, keep_zeros(kept))
    for name, rule in (("magnitude", "magnitude"), ("sr-ste", "sr-ste"), ("movement", "movement")):
        model = load()
        schedule = {"kind": "one-shot", "stages": 1, "end": 0.5, "every": 10_000, "dense": 0}
        found[name] = (model, sparsify(model, rule, schedule))
    return found


def stepper(model: Any, ids: torch.Tensor) -> Step:
    """One step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(rounds: int, batch_size: int, length: int) -> list[dict[str, Any]]:
    """Seconds of a step, in each way."""
    with contextlib.ExitStack() as stack:
        found = ways(stack)
        vocabulary = found["none"][0].config.vocab_size
        ids = torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in found}
        steps = {name: stepper(model, ids) for name, (model, _) in found.items()}
        for number in range(rounds + 11):  # the first steps of keep_zeros check the optimizer
            for name, (model, masks) in found.items():
                with masks or contextlib.nullcontext():
                    began = time.perf_counter()
                    steps[name]()
                    took = time.perf_counter() - began
                if number == 10:
                    _check(name, model)
                if number > 10:
                    seconds[name].append(took)
    plain = statistics.median(seconds["none"])
    return [
        {
            "masks": name, "seconds": statistics.median(taken),
            "ratio": statistics.median(one / other for one, other in zip(taken, seconds["none"], strict=True)),
            "spread": [min(taken), max(taken)], "rounds": rounds, "batch_size": batch_size, "length": length,
            "plain_seconds": plain, "threads": torch.get_num_threads(), "versions": versions(),
            "device": describe_device(torch.device("cpu")),
        }
        for name, taken in seconds.items()
    ]  # fmt: skip


def _check(name: str, model: Any) -> None:
    zeros = [float(target.parameter.eq(0).float().mean()) for target in find_targets(model)]
    assert (max(zeros) < 0.01) if name == "none" else all(abs(share - 0.5) < 0.01 for share in zeros), (name, zeros)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(arguments)
    rows = measure(args.rounds, args.batch_size, args.length)
    table = Table("masks", "ms of a step", "of a step without", "fastest to slowest")
    for row in rows:
        least, most = (f"{1000 * value:.0f}" for value in row["spread"])
        table.add_row(row["masks"], f"{1000 * row['seconds']:.0f}", f"{row['ratio']:.3f}", f"{least} to {most}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
