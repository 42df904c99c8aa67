"""Malformed checkpoints x every reader: refused by a typed error within a second, or read rightly."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from folders import tensors
from malformed import FAULTS, Fault
from packed_models import save_packed
from tiny_models import build, random_ids, recipe, save
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from llmprune import pack, perplexity, prune
from llmprune.errors import LlmpruneError
from llmprune.models.boundary import load_tokenizer
from llmprune.pruning.forecast.forecast import dry_run
from llmprune.serving.loader import load
from llmprune.serving.server import serve
from llmprune.text.tokens import TextSpec

PACKED = {"nm": "2:4", "bitmask": "0.5", "block": "0.5@16x16"}
BENCH = ("--tokens", "1", "--batches", "1", "--length", "4", "--seconds", "0", "-q")
IDS = random_ids(1, 16)

# Of this process alone: the machine may be busy.
SECONDS = 2.0

# One of each kind and of each way to fail; the others are as fast, but many.
USUAL = {
    "config:hidden_size=text", "config:num_attention_heads=0", "config:num_hidden_layers=-1", "config:hidden_act=text",
    "config:million-layers", "config:more-layers", "config:wider", "config:file-nested", "config:file-absent",
    "config:rope_parameters=list", "header:length-2^63", "header:cut-last-byte", "header:shape=transposed",
    "header:nested", "index:names-parent", "index:names-long-shard", "index:metadata-list", "index:lacks-tensor",
    "tensor:weight-absent", "tensor:norm-renamed", "tensor:head-int32-bits", "tensor:weight-nan",
    "tensor:embeddings-infinite", "tensor:fifo", "tensor:of-nothing", "tensor:pickle",
    "companion:generation_config.json-nested", "companion:tokenizer.json-model", "record:modules=null",
    "record:entry=number", "record:version=true", "record:gone", "record:lacks-module", "packed:nm-values-absent",
    "packed:nm-values-int16", "packed:bitmask-mask-255", "packed:block-crow-0", "packed:nm-values-nan",
}  # fmt: skip


def each(faults: Iterable[Fault]) -> pytest.MarkDecorator:
    """Run a test with each of them, the unusual ones among `families`."""
    cases = [pytest.param(f, id=f.name, marks=[] if f.name in USUAL else [pytest.mark.families]) for f in faults]
    return pytest.mark.parametrize("fault", cases)


def prunes_apart(fault: Fault) -> bool:
    """Whether pruning could treat it otherwise than loading: files, headers and records pass the same gate."""
    return fault.name in USUAL or fault.kind in ("tensor", "companion") or (fault.kind == "config" and fault.typed)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints that are broken, and a text."""
    folder = tmp_path_factory.mktemp("good")
    bases = {"dense": save(build("llama"), folder / "dense")}
    bases["sharded"] = save(build("llama"), folder / "sharded", max_shard_size="40KB")
    bases |= {layout: save_packed(folder / layout, layout, pattern) / "packed" for layout, pattern in PACKED.items()}
    bases["text"] = folder / "text.jsonl"
    words = (" ".join(f"w{4 + (7 * line + word) % 120}" for word in range(40)) for line in range(6))
    bases["text"].write_text("\n".join(json.dumps({"text": line}) for line in words))
    return bases


def broken(fault: Fault, good: dict[str, Path], folder: Path) -> Path:
    shutil.copytree(good[fault.base], folder)
    fault.apply(folder)
    return folder


@contextmanager
def quick() -> Iterator[None]:
    """Fail if it hangs, or takes long."""

    def give_up(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    begun = time.process_time()
    try:
        yield
        assert time.process_time() - begun < SECONDS
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def small(good: dict[str, Path]) -> dict[str, Any]:
    text = {"source": str(good["text"]), "samples": 2, "length": 16}
    return recipe(method="magnitude", calibration=text, held_back=1)


@each(filter(prunes_apart, FAULTS))
def test_pruning_refuses_it_or_prunes_what_is_there(fault: Fault, good: dict[str, Path], tmp_path: Path) -> None:
    folder = broken(fault, good, tmp_path / "model")
    with quick():
        try:
            prune(folder, small(good), tmp_path / "out")
        except LlmpruneError:
            return
    assert not fault.typed
    there, pruned = tensors(folder), tensors(tmp_path / "out")
    assert pruned.keys() == there.keys()
    for key, weight in there.items():
        kept = pruned[key] != 0
        assert torch.equal(pruned[key][kept], weight[kept]), key
        assert kept.float().mean().item() == pytest.approx(0.5 if key.endswith("proj.weight") else 1, abs=0.02)


@each(FAULTS)
def test_loading_refuses_it_or_loads_what_is_there(fault: Fault, good: dict[str, Path], tmp_path: Path) -> None:
    folder = broken(fault, good, tmp_path / "model")
    with quick():
        try:
            model = load(folder, device="cpu")
        except LlmpruneError:
            return
    assert not fault.typed
    there = tensors(folder)
    for name, value in model.named_parameters():
        assert torch.equal(value.to(there[name].dtype), there[name]), name
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=IDS).logits).all())


# Without our record, transformers refuses it by itself.
@each(f for f in FAULTS if f.base in PACKED and f.name != "record:gone")
def test_transformers_reads_no_malformed_packed_checkpoint(fault: Fault, good: dict[str, Path], tmp_path: Path) -> None:
    assert fault.typed
    with quick(), pytest.raises(LlmpruneError):
        AutoModelForCausalLM.from_pretrained(broken(fault, good, tmp_path / "model"))


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.kind == "companion"], ids=lambda fault: fault.name)
def test_a_malformed_tokenizer_is_refused_or_equals_the_good_one(
    fault: Fault, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = broken(fault, good, tmp_path / "model")
    with quick():
        try:
            read = load_tokenizer(folder)
        except LlmpruneError:
            return
    assert read("w5 w77 w9")["input_ids"] == [5, 77, 9]


def command(*arguments: object) -> None:
    """Run a command, which must explain a failure."""
    result = run(*arguments)
    if result.exit_code:
        assert result.exit_code == 1, result.output
        raise LlmpruneError(result.stderr)


READERS: dict[str, Callable[[Path, dict[str, Path]], object]] = {
    "dry run": lambda folder, good: dry_run(folder, small(good)),
    "perplexity": lambda folder, good: perplexity(folder, TextSpec(str(good["text"]), samples=1, length=16)),
    "pack": lambda folder, good: pack(folder, folder.parent / "packed"),
    "generate": lambda folder, good: command("generate", folder, "--prompt", "w5", "--device", "cpu"),
    "serve": lambda folder, good: serve(lambda: load(folder), lambda: load_tokenizer(folder), "x", port=0),
    "bench": lambda folder, good: command("bench", folder, "--device", "cpu", *BENCH),
    "eval": lambda folder, good: import_module("llmprune.measuring.tasks.model").LlmpruneLM(str(folder), device="cpu"),
}
SLOW = {"eval": pytest.mark.slow, "bench": pytest.mark.slow}
EACH = ("config:hidden_size=text", "config:file-nested", "header:cut-last-byte", "tensor:weight-absent",
        "tensor:head-int32-bits", "index:names-parent", "record:modules=null", "packed:nm-values-absent")  # fmt: skip


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("reader", [pytest.param(name, marks=SLOW.get(name, ())) for name in READERS])
def test_every_reader_passes_the_same_gate(reader: str, name: str, good: dict[str, Path], tmp_path: Path) -> None:
    if reader == "eval":
        pytest.importorskip("lm_eval.models.huggingface")  # slow to import
    if reader == "serve" and not is_serve_available():
        pytest.skip("the extra llmprune[serve] is not installed")
    fault = next(fault for fault in FAULTS if fault.name == name)
    with quick(), pytest.raises(LlmpruneError):
        READERS[reader](broken(fault, good, tmp_path / "model"), good)
