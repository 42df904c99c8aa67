"""Predicted and measured peak memory of pruning, each model in a process of its own, on the CPU.

    python -m llmprune.eval.bench.memory testbed --recipe demo --output memory-cpu.json
    python -m llmprune.eval.bench.memory testbed HuggingFaceTB/SmolLM2-135M deep --recipe wanda-50

`deep` is a random Llama of 60 layers of 9.1 MB each, written once to --work.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.devices import describe_device
from llmprune.pruning.context import versions
from llmprune.storage.files import write_json

_DEEP = {
    "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 60, "num_attention_heads": 10,
    "num_key_value_heads": 5, "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip

_PROGRAM = """
import json, sys
from llmprune import prune
print(json.dumps(prune(*sys.argv[1:4], overrides=sys.argv[4:]).header["memory"]))
"""


def deep_model(folder: Path) -> Path:
    """Write the random model of 60 layers, unless it already exists."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**_DEEP, dtype="bfloat16")).to(torch.bfloat16).save_pretrained(folder)
    return folder


def measure(model: str, recipe: str, samples: int, length: int) -> dict[str, object]:
    """Prune on self-generated text, without an evaluation; returns the report's figures and their ratio."""
    settings = (f"calibration.samples={samples}", f"calibration.length={length}", "evaluation=null", "device=cpu")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _PROGRAM, model, recipe, f"{folder}/pruned", *settings]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    memory = json.loads(finished.stdout.splitlines()[-1])
    return {"model": model, **memory, "measured_by_predicted": memory["measured_bytes"] / memory["predicted_bytes"]}


def main() -> None:
    """Measure the models one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmprune-memory")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for model in options.models:
        name = str(deep_model(options.work / model)) if model == "deep" else model
        # A folder of this machine tells others nothing.
        shown = Path(model).name if Path(model).is_dir() else model
        rows.append({**measure(name, options.recipe, options.samples, options.length), "model": shown})
        print(json.dumps(rows[-1]), flush=True)
    if options.output is not None:
        settings = {name: getattr(options, name) for name in ("recipe", "samples", "length")}
        device = describe_device(torch.device("cpu"))
        write_json(options.output, {**settings, "device": device, "version": versions(), "rows": rows})


if __name__ == "__main__":
    main()
