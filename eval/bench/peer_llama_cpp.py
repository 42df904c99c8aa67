"""Beside llama.cpp on a CPU: tokens a second, perplexity and bytes, with the same threads and the same token ids.

    python -m llmprune.eval.bench.peer_llama_cpp MODEL --pruned FOLDER ... --llama-cpp CLONE --text FILE --json FILE

llama.cpp runs MODEL, converted by its own converter to each of --types; llmprune runs MODEL dense and each --pruned
checkpoint, in the dtype that it chooses for the machine. All models are in memory together and generate in turns, one
sequence, greedily, from a random prompt. Perplexity is that of the runtime which is timed, on sequences of the text.

Needs llama-cpp-python, whose wheel is compiled for the machine: CMAKE_ARGS=-DGGML_NATIVE=ON pip install
llama-cpp-python. Its source distribution holds the clone of llama.cpp (vendor/llama.cpp) that --llama-cpp names, whose
converter needs the packages gguf and sentencepiece.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llmprune
from llmprune.exporting.export import export
from llmprune.measuring.bench.decoding import Generation, take_turns
from llmprune.measuring.bench.machine import commit, device_name, versions
from llmprune.storage.files import write_json
from llmprune.storage.hub import resolve_model
from llmprune.text.loading import load_tokenizer
from llmprune.text.tokens import TextSpec, load_tokens
from llmprune.timing import Timing

LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Engine:
    """A model as one of the two programs runs it.

    Attributes:
        name: of program and model.
        nbytes: of its files of weights.
        generate: new tokens -> seconds to the first, and of all others.
        logits: ids [length] -> logits [length, vocabulary], float32.
    """

    name: str
    nbytes: int
    generate: Callable[[int], tuple[float, float]]
    logits: Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, measure in turns, print and write the rows."""
    args = _parse(arguments)
    dense = resolve_model(args.model)
    spec = TextSpec(str(args.text), samples=args.samples, length=args.length, order="text", layout="pack-bare")
    ids = load_tokens(spec, load_tokenizer(dense)).ids
    engines = [
        ours(name, folder, args.prompt) for name, folder in (("dense", dense), *((p.name, p) for p in args.pruned))
    ]
    for kind in args.types:
        engines.append(theirs(dense, kind, args.llama_cpp, args.work, args.prompt, ids.shape[1]))
    runs = take_turns([engine.generate for engine in engines], args.new_tokens, args.rounds)
    rows = [
        {
            "engine": engine.name, "bytes": engine.nbytes,
            "tokens_per_second": round((args.new_tokens - 1) / Timing.of([later for _, later in own]).median, 2),
            "first_token": Timing.of([first for first, _ in own]).to_dict(),
            "all_others": Timing.of([later for _, later in own]).to_dict(),
            "perplexity": perplexity(engine, ids),
        }
        for engine, own in zip(engines, runs, strict=True)
    ]  # fmt: skip
    for row in rows:
        print(
            f"{row['engine']}: {row['tokens_per_second']:.1f} tokens/s, first token after "
            f"{row['first_token']['median_us'] / 1e6:.3f} s, perplexity {row['perplexity']:.3f}, "
            f"{row['bytes'] / 1e6:.0f} MB"
        )
    if args.json:
        write_json(args.json, {
            "model": dense.name, "threads": torch.get_num_threads(), "device": device_name(torch.device("cpu")),
            "versions": {**versions(), "llama-cpp-python": _package().__version__}, "commit": commit(),
            "prompt_tokens": args.prompt, "new_tokens": args.new_tokens, "rounds": args.rounds,
            "text": f"{args.text.name}, {args.samples} x {args.length}", "rows": rows,
        })  # fmt: skip


def perplexity(engine: Engine, ids: Tensor) -> float:
    """Of a model on sequences [samples, length], each token but the first predicted from its own sequence."""
    nats = [torch.nn.functional.cross_entropy(engine.logits(one)[:-1], one[1:]).double() for one in ids]
    return float(torch.stack(nats).mean().exp())


def ours(name: str, folder: Path, prompt: int) -> Engine:
    """A checkpoint as llmprune serves it."""
    model = llmprune.load(folder, device="cpu")

    @torch.inference_mode()
    def logits(ids: Tensor) -> Tensor:
        return model(ids[None]).logits[0].float()

    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Engine(f"llmprune {name}", nbytes, Generation(model, 1, prompt), logits)


def theirs(dense: Path, kind: str, clone: Path, work: Path, prompt: int, length: int) -> Engine:
    """A checkpoint as llama.cpp runs it: converted once, and read twice, since all logits would slow down a prompt."""
    file = work / f"{dense.name}-{kind}.gguf"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        export(dense, "gguf", file, llama_cpp=clone, gguf_type=kind)
    threads = torch.get_num_threads()
    common = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    fast = _package().Llama(str(file), n_ctx=prompt + 256, **common)
    whole = _package().Llama(str(file), n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, **common)
    ids = torch.randint(fast.n_vocab(), (prompt,), generator=torch.Generator().manual_seed(1)).tolist()

    def generate(new_tokens: int) -> tuple[float, float]:
        fast.reset()
        times = [time.perf_counter()]
        fast.eval(ids)
        for _ in range(new_tokens - 1):
            times.append(time.perf_counter())
            fast.eval([_most_likely(fast)])
        times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1]

    def logits(tokens: Tensor) -> Tensor:
        whole.reset()
        whole.eval(tokens.tolist())
        return torch.from_numpy(whole.scores[: len(tokens)].copy())

    return Engine(f"{LLAMA_CPP} {kind}", file.stat().st_size, generate, logits)


def _most_likely(model: Any) -> int:
    found = _package().llama_get_logits_ith(model.ctx, -1)
    address = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
    return int(np.ctypeslib.as_array(address, shape=(model.n_vocab(),)).argmax())


def _package() -> Any:
    import llama_cpp

    return llama_cpp


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense checkpoint that llama.cpp's converter accepts")
    parser.add_argument("--pruned", type=Path, nargs="*", default=[], help="checkpoints, packed or not")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a clone of llama.cpp")
    parser.add_argument("--types", nargs="*", default=["bf16", "q8_0"], help="of its converter")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="folder for the converted files")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
