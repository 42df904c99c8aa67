"""vLLM with a dense checkpoint against vLLM with the packed one: load, memory, throughput, latency.

    python -m llmprune.eval.bench.vllm DENSE PACKED --json FILE [--dtype bfloat16] [--requests 1,8,64]

Two processes, one engine each, which take turns: dense, packed, dense, ... for every number of requests, so that what
changes on the machine meets both. First the same prompts go through both engines; if the log-probabilities of their
tokens differ by more than --tolerance, nothing is timed.

Load is what vLLM's loader does: building the model, reading the weights, converting them. Its peak memory is that of
the process above what it had before (CPU), or of the allocator (GPU). Each timed call generates --output-tokens for
that many prompts of --input-tokens random tokens, all at once; TTFT is a call for one token. Medians of --repeats.
Start it outside a clone of llmprune. --share is the part of a GPU that each engine takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from llmprune.devices import PeakWatch, describe_host
from llmprune.measuring.bench.machine import commit
from llmprune.storage.files import write_json

SIDES = ("dense", "packed")
_CHECKED_PROMPTS, _CHECKED_TOKENS = 8, 32


class Engine:
    """An engine in a process of its own, which answers one request after another.

    Args:
        folder: of the checkpoint.
        args: as `main` reads them.

    Attributes:
        loaded: what loading took.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        options = {"folder": str(folder), **{key: getattr(args, key) for key in ("dtype", "eager", "share", "kv_gib")}}
        options["length"] = max(args.input_tokens + args.output_tokens, _CHECKED_TOKENS) + 8
        options["requests"] = max(args.requests)
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--child", json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Let the engine do something; what it answers."""
        self._pipe(self._process.stdin).write(json.dumps(request) + "\n")
        self._pipe(self._process.stdin).flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        with self._process:  # closes the pipes, upon which it ends, and waits
            pass

    def _answer(self) -> dict[str, Any]:
        for line in self._pipe(self._process.stdout):
            if line.startswith("answer "):  # vLLM prints, too
                found: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return found
        self.close()
        raise SystemExit(f"an engine has ended with status {self._process.returncode}; its messages are above")

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Start both engines, compare them, time them in turn, print the rows, write the JSON."""
    args = _parse(arguments)
    if args.child:
        serve(json.loads(args.child))
        return
    engines = {side: Engine(getattr(args, side), args) for side in SIDES}
    try:
        result = measure(engines, args)
    finally:
        for engine in engines.values():
            engine.close()
    for line in lines(result):
        print(line)
    if args.json:
        write_json(args.json, result)


def measure(engines: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Compare and time two engines.

    Args:
        engines: "dense" and "packed"; each has `loaded` and `ask`.
        args: as `main` reads them.

    Raises:
        SystemExit: their log-probabilities differ by more than the tolerance.
    """
    logs = [
        engine.ask(do="logs", prompts=_CHECKED_PROMPTS, tokens=_CHECKED_TOKENS)["logs"] for engine in engines.values()
    ]
    differences = [abs(one - other) for one, other in zip(*logs, strict=True)]
    # The largest one, or one that is not a number, which is larger than any tolerance.
    difference = next((found for found in differences if found != found), max(differences))
    if not difference <= args.tolerance:
        raise SystemExit(
            f"the log-probabilities of the two engines differ by {difference:.3g} nats\n"
            f"expected: at most {args.tolerance:g}; the packed checkpoint is that of the dense one\n"
            "fix: pack the dense checkpoint again, or give the tolerance of the dtype by --tolerance"
        )
    rows = [_row(engines, requests, args) for requests in args.requests]
    return {
        "model": args.name or args.dense.name,
        "host": describe_host(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": engines["dense"].loaded["versions"],
        "commit": commit(),
        "dtype": args.dtype,
        "compiled": not args.eager,
        "input_tokens": args.input_tokens,
        "output_tokens": args.output_tokens,
        "repeats": args.repeats,
        "largest_difference_nats": difference,
        "load": {side: {k: v for k, v in engine.loaded.items() if k != "versions"} for side, engine in engines.items()},
        "rows": rows,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """What the terminal shows."""
    load = result["load"]
    seconds, peak, held = (
        ", ".join(f"{side} {load[side][key] / unit:.2f}" for side in SIDES)
        for key, unit in (("seconds", 1), ("peak_bytes", 1e9), ("weight_bytes", 1e9))
    )
    found = [f"load, s: {seconds}", f"peak while loading, GB: {peak}", f"weights, GB: {held}"]
    for row in result["rows"]:
        rates = ", ".join(f"{side} {row[side]['tokens_per_second']:.1f}" for side in SIDES)
        first = ", ".join(f"{side} {row[side]['first_token_seconds']:.3f}" for side in SIDES)
        found.append(f"{row['requests']} requests: {rates} tokens/s ({row['speed_up']:.2f}x); TTFT, s: {first}")
    return found


def _row(engines: dict[str, Any], requests: int, args: argparse.Namespace) -> dict[str, Any]:
    calls: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for turn in range(args.repeats + 1):
        for side, engine in engines.items():
            work = {"do": "generate", "requests": requests, "tokens": args.input_tokens, "seed": turn}
            whole = engine.ask(**work, new_tokens=args.output_tokens)["seconds"]
            first = engine.ask(**{**work, "seed": turn + 1000}, new_tokens=1)["seconds"]
            if turn:  # the first warms up
                calls[side].append((whole, first))
    row: dict[str, Any] = {"requests": requests}
    for side, found in calls.items():
        whole, first = (statistics.median(values) for values in zip(*found, strict=True))
        row[side] = {
            "seconds": [seconds for seconds, _ in found],
            "tokens_per_second": requests * args.output_tokens / whole,
            "first_token_seconds": first,
            "seconds_per_token": (whole - first) / max(args.output_tokens - 1, 1),
        }
    row["speed_up"] = row["packed"]["tokens_per_second"] / row["dense"]["tokens_per_second"]
    return row


def serve(options: dict[str, Any]) -> None:
    """Load an engine, say what that took, and answer requests until stdin ends."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is measured in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(options["kv_gib"]))
    from vllm import LLM, SamplingParams

    watch = _LoadWatch()
    engine = LLM(
        options["folder"],
        dtype=options["dtype"],
        enforce_eager=options["eager"],
        max_model_len=options["length"],
        max_num_seqs=max(options["requests"], _CHECKED_PROMPTS),
        gpu_memory_utilization=options["share"],
        enable_prefix_caching=False,
    )
    _say(watch.found(engine))
    vocabulary = engine.get_tokenizer().vocab_size

    def prompts(count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocabulary, (count, tokens), generator=generator)
        return [{"prompt_token_ids": row} for row in ids.tolist()]

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "logs":
            sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
            given = prompts(request["prompts"], request["tokens"], 0)
            results = engine.generate(given, sampling, use_tqdm=False)
            logs = [next(iter(row.values())).logprob for result in results for row in result.prompt_logprobs[1:]]
            _say({"logs": logs})
        else:
            count = request["new_tokens"]
            sampling = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
            given = prompts(request["requests"], request["tokens"], request["seed"])
            started = time.perf_counter()
            engine.generate(given, sampling, use_tqdm=False)
            _say({"seconds": time.perf_counter() - started})


class _LoadWatch:
    """Times vLLM's loader, and watches the memory meanwhile."""

    def __init__(self) -> None:
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader

        self.seconds, self.peak_bytes = 0.0, 0
        load: Callable[..., Any] = BaseModelLoader.load_model

        def watched(loader: Any, *args: Any, **options: Any) -> Any:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            started = time.perf_counter()
            with PeakWatch(device) as watch:
                model = load(loader, *args, **options)
            self.seconds, self.peak_bytes = time.perf_counter() - started, watch.peak - watch.baseline
            return model

        BaseModelLoader.load_model = watched

    def found(self, engine: Any) -> dict[str, Any]:
        """What loading took, with the versions of what was loaded."""
        import transformers
        import vllm

        (held,) = engine.apply_model(_weight_bytes)
        names = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "weight_bytes": held, "versions": names}


def _weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _say(answer: dict[str, Any]) -> None:
    print(f"\nanswer {json.dumps(answer)}", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, nargs="?", help="folder of the pruned, dense checkpoint")
    parser.add_argument("packed", type=Path, nargs="?", help="folder of the packed one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.5, help="nats, for one token")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--share", type=float, default=0.45, help="of a GPU's memory, for each engine")
    parser.add_argument("--kv-gib", type=int, default=1, help="KV cache of each engine on a CPU")
    parser.add_argument("--name", help="what the figures call the model")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.child and args.packed is None:
        parser.error("two folders are needed: DENSE PACKED")
    return args


if __name__ == "__main__":
    main()
