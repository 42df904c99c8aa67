"""ONNX Runtime beside torch on a CPU: dense, with zeros, with fewer channels, and our packed form.

    python -m llmprune.eval.bench.onnx testbed random --work FOLDER --prepare
    python -m llmprune.eval.bench.onnx testbed random --work FOLDER --json results/onnx-cpu.json

| row | weights |
|---|---|
| dense | of the model |
| unstructured | half of each row zero, by magnitude |
| structured | half of the FFN channels gone; random weights, since their values do not matter for speed |

Each is run in float32 by torch (transformers' own model) and by ONNX Runtime, with the same threads, as one forward
pass without a cache; unstructured also by `llmprune.load` of the packed checkpoint. The logits of every pair are
compared first. All ways take turns of several runs; figures are medians. "random" is a Llama of random weights with 4
layers of the size that models of a billion weights have: torch needs minutes to translate more of them, and the values
do not matter. The first command makes the models, which takes minutes; the second uses them, on a machine that does
nothing else.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.eval.bench.archive import prune_by_magnitude
from llmprune.exporting.export import export
from llmprune.measuring.bench.machine import commit, device_name, versions
from llmprune.models import boundary
from llmprune.models.skeleton import quiet_transformers
from llmprune.pruning.packing import pack
from llmprune.serving.loader import load
from llmprune.storage.files import write_json
from llmprune.storage.hub import resolve_model
from llmprune.timing import Timing

TOKENS = (1, 32, 256)
RANDOM = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096,
}  # fmt: skip
_TOLERANCE = 1e-3
_LEAST_RUNS, _RUNS = 10, 10

Forward = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per measurement, and write JSON."""
    args = _parse(arguments)
    rows = []
    for model in args.models:
        folders = prepare(model, args.work / Path(model).name)
        for row in () if args.prepare else measure(folders, args.tokens, args.seconds):
            rows.append({"model": Path(model).name, **row})
            print(_line(rows[-1]), flush=True)
    if args.json and rows:
        where = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "commit": commit()}
        found = {**versions(), "onnxruntime": onnxruntime.__version__}
        write_json(args.json, [{**row, **where, "versions": found} for row in rows])


def prepare(model: str | Path, work: Path) -> dict[str, Path]:
    """Make the folders to compare, unless they are there, with an ONNX graph beside each; by kind of weights.

    Args:
        model: a dense model, or "random".
        work: where they are.
    """
    folders = {kind: work / kind for kind in ("dense", "unstructured", "structured")}
    if not work.exists():
        if model == "random":
            with quiet_transformers():
                LlamaForCausalLM(LlamaConfig(**RANDOM)).bfloat16().save_pretrained(folders["dense"])
        else:
            shutil.copytree(resolve_model(model), folders["dense"])
        shutil.copytree(folders["dense"], folders["unstructured"])
        prune_by_magnitude(folders["unstructured"], "0.5")
        pack(folders["unstructured"])
        config = boundary.read_stock_config(folders["dense"])
        config.intermediate_size //= 2
        with quiet_transformers():
            boundary.build_stock_model(config, dtype=torch.float32).save_pretrained(folders["structured"])
        for folder in folders.values():
            export(folder, "onnx")
    return folders


def measure(folders: Mapping[str, Path], tokens: Sequence[int], duration: float) -> Iterator[dict[str, Any]]:
    """Milliseconds of a forward pass, a row for every kind of weights and number of tokens.

    Args:
        folders: as `prepare` made them.
        tokens: of one sequence.
        duration: seconds for each row, in which all ways take turns; at least ten runs of each.
    """
    for kind, folder in folders.items():
        ways = _ways(folder, packed=kind == "unstructured")
        for count in tokens:
            yield {"weights": kind, "tokens": count, "load": os.getloadavg()[0], **_timed(ways, count, duration)}


def _ways(folder: Path, *, packed: bool) -> dict[str, Forward]:
    config = boundary.read_stock_config(folder)
    model = boundary.load_stock_model(folder, config, dtype=torch.float32).eval()
    graph = folder.with_name(f"{folder.name}-onnx") / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads that wait would slow the others
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    ways: dict[str, Forward] = {
        "torch": lambda ids: model(input_ids=ids, use_cache=False).logits,
        "onnxruntime": lambda ids: torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0]),
    }
    if packed:
        ours = load(folder.with_name(f"{folder.name}-packed"), device="cpu", dtype=torch.float32)
        ways["packed"] = lambda ids: ours(input_ids=ids, use_cache=False).logits
    return ways


@torch.no_grad()
def _timed(ways: Mapping[str, Forward], tokens: int, duration: float) -> dict[str, Any]:
    ids = torch.randint(5, 100, (1, tokens), generator=torch.Generator().manual_seed(0))
    wanted = ways["torch"](ids)
    for name, way in ways.items():
        if not float((way(ids) - wanted).abs().max()) <= _TOLERANCE * float(wanted.abs().max()):
            raise SystemExit(f"the logits of {name} differ from torch's")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    begun = time.perf_counter()
    while len(seconds["torch"]) < _LEAST_RUNS or time.perf_counter() - begun < duration:
        for name, way in ways.items():
            way(ids)  # the threads of the way before may still be waiting for work
            for _ in range(_RUNS):
                start = time.perf_counter()
                way(ids)
                seconds[name].append(time.perf_counter() - start)
    timings = {name: Timing.of(measured) for name, measured in seconds.items()}
    medians = {f"{name}_ms": 1e3 * timing.median for name, timing in timings.items()}
    return {**medians, "timings": {name: timing.to_dict() for name, timing in timings.items()}}


def _line(row: Mapping[str, Any]) -> str:
    times = "  ".join(f"{key[:-3]} {value:.2f} ms" for key, value in row.items() if key.endswith("_ms"))
    return f"{row['model']:14} {row['weights']:13} {row['tokens']:4} tokens  {times}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="hub ids, folders, testbed or random")
    parser.add_argument("--work", type=Path, required=True, help="where the models are made, and kept")
    parser.add_argument("--prepare", action="store_true", help="make the models, and measure nothing")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
