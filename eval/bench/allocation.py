"""Perplexity of every allocation beside uniform, on one model and one pair of texts.

    python -m llmprune.eval.bench.allocation --calibration calibration.jsonl --heldout heldout.jsonl --json FILE

The protocol is that of `quality`: float32, 128 packed sequences of 256 tokens for calibration, 400 held-out ones for
perplexity. The divergences are what the run itself measured: with Wanda masks, on 8 validation sequences and 8 more.
A file that exists is added to: cells that it has are not measured again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from llmprune.measuring.perplexity import measure_perplexity
from llmprune.models.source import ModelSource
from llmprune.pruning.pipeline import prune
from llmprune.storage.hub import resolve_model
from llmprune.stream.stream import StreamSettings
from llmprune.text.loading import load_texts, load_tokenizer
from llmprune.text.tokens import TextSpec

ALLOCATIONS: tuple[Any, ...] = (
    "uniform", "owl", "alpha", "dlp", "atp", "sensitivity", "search",
    {"search": {"generations": 10, "offspring": 8}},
)  # fmt: skip
PATTERNS = ("0.7", "0.5")
_TEXT: dict[str, Any] = {"length": 256, "order": "text", "layout": "pack-bare"}


def measure(model: str, method: str, pattern: str, allocation: Any, calibration: Path, heldout: Path) -> dict[str, Any]:
    """Prune the model in memory, in float32, and measure it."""
    folder = resolve_model(model)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False)
    recipe = {
        "pattern": pattern,
        "method": method,
        "allocation": allocation,
        "calibration": {"source": str(calibration), "samples": 128, **_TEXT},
        "evaluation": None,
        "held_back": 8,
        "batch_size": 16,
    }
    tokenizer, started = load_tokenizer(folder), time.process_time()
    report = prune(dense, recipe, tokenizer=tokenizer)
    seconds = time.process_time() - started
    source, settings = ModelSource(dense), StreamSettings(batch_size=16)
    spec = {"heldout": TextSpec(str(heldout), samples=400, **_TEXT)}
    found = measure_perplexity(source, load_texts(spec, source, tokenizer, settings.device)["heldout"], settings)
    record = report.header.get("allocation") or {}
    return {
        "method": method,
        "pattern": pattern,
        "allocation": allocation,
        "zeros": sum(row.zeros for row in report.rows),
        "perplexity": found.perplexity,
        "divergence": record.get("divergence"),
        "uniform_divergence": record.get("uniform_divergence"),
        "cpu_seconds": seconds,
        "units": record.get("units"),
    }


def main() -> None:
    """Measure all cells that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--heldout", type=Path, required=True, help="jsonl with a text column")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt"])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--allocations", nargs="+", type=json.loads, default=ALLOCATIONS, help="as JSON")
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    args = parser.parse_args()
    cells = json.loads(args.json.read_text()) if args.json.exists() else []
    known = [[cell["method"], cell["pattern"], cell["allocation"]] for cell in cells]
    for method in args.methods:
        for pattern in args.patterns:
            for allocation in args.allocations:
                if [method, pattern, allocation] in known:
                    continue
                cells.append(measure(args.model, method, pattern, allocation, args.calibration, args.heldout))
                print(f"{method} {pattern} {allocation}: {cells[-1]['perplexity']:.2f}", flush=True)
                args.json.write_text(json.dumps(cells, indent=2) + "\n")


if __name__ == "__main__":
    main()
