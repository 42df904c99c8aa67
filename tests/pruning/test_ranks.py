"""Several processes prune what one prunes."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents, tensors
from fresh_processes import Finished, FreshProcesses
from streams import stream
from tiny_models import build, random_ids, recipe, save

from llmprune.errors import CalibrationError, DeviceError, PeerError, RecipeError
from llmprune.progress import Progress
from llmprune.pruning.context import Run
from llmprune.pruning.on_disk import prune_checkpoint
from llmprune.pruning.pipeline import prune
from llmprune.pruning.sharing import require_same
from llmprune.ranks import Ranks, join
from llmprune.recipe.recipe import load_recipe
from llmprune.storage.report import Report, load_report
from llmprune.stream.stream import StreamSettings, require_batches

WORKER = Path(__file__).parents[1] / "ranks_worker.py"
_FITTED = {"epochs": 2, "lr": 3e-3, "sequences": 2}

# name -> (family, changes to the recipe). Held-back sequences make a batch of their own, so one process has none.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsegpt": ("llama", {"method": "sparsegpt", "pattern": "2:4", "evaluation": {"samples": 3}}),
    "chain": ("llama", {"method": ["wanda", "swaps", "refit"]}),
    "layer shares": ("llama", {"method": "wanda", "pattern": "0.5/layer"}),
    "in turn": ("llama", {"method": "sparsegpt", "statistics": {"sequential": True, "alpha": 0.5}}),
    "loss weight": ("llama", {"method": "sparsegpt", "statistics": {"loss_weight": "tokens"}}),
    "experts": ("mixtral", {"experts": {"min_tokens": 8}, "calibration": {"samples": 9, "length": 4}}),
    "parts fitted": (
        "llama",
        {"method": "wanda", "reconstruct": {**_FITTED, "window": "attention+mlp"}, "quantise": {}},
    ),
    "structures": ("llama", {"structures": {"heads": {"remove": 1}, "ffn": {"remove": 0.25}}}),
    "experts narrowed": ("mixtral", {"structures": {"ffn": {"remove": 0.25}}, "held_back": 4}),
    "experts removed": ("mixtral", {"structures": {"experts": {"remove": 1, "method": "reap"}}}),
    "layers replaced": ("llama", {"structures": {"depth": {"remove": 1, "replace": "linear"}}}),
    "allocation": ("llama", {"method": "wanda", "pattern": "0.5", "allocation": "owl"}),
}


@dataclass(frozen=True)
class Pruned:
    """The results of one case, by one process and by two."""

    alone: Report
    together: Report
    alone_in: Path
    together_in: Path


# What each process of a run is told by torchrun, whose start takes seconds, and which test_launching.py has.
_TOGETHER = """
import os, sys
from pathlib import Path
folder, cases, processes, port = {arguments!r}
sys.path.insert(0, folder)
import ranks_worker
children = []
for rank in range(processes):
    if not (child := os.fork()):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        ranks_worker.main(Path(cases))
        sys.exit()
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""
_IMPORTED = ("llmprune.pruning.pipeline", "transformers.models.llama.modeling_llama")


@pytest.fixture(scope="module")
def run_warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """Run programs that find imported what every run imports."""
    with ExitStack() as stack:
        yield FreshProcesses(tmp_path_factory.mktemp("warm"), stack)


def run_together(run_warm: FreshProcesses, folder: Path, cases: list[dict[str, Any]], processes: int = 2) -> Finished:
    """Run cases in several processes."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (str(WORKER.parent), str(file), processes, port)
    return run_warm(_TOGETHER.format(arguments=arguments), _IMPORTED)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, run_warm: FreshProcesses) -> dict[str, Pruned]:
    """Every case, pruned both ways."""
    folder = tmp_path_factory.mktemp("ranks")
    changes: dict[str, dict[str, Any]] = {"llama": {"num_hidden_layers": 4}, "mixtral": {"num_local_experts": 16}}
    models = {name: save(build(name, **changes.get(name, {})), folder / name) for name, _ in CASES.values()}
    cases = [
        {"model": str(models[family]), "output": str(folder / "together" / name), "recipe": settings_of(change)}
        for name, (family, change) in CASES.items()
    ]
    done = run_together(run_warm, folder, [*cases, {**cases[0], "output": str(folder / "again")}])
    assert done.status == 0, done.printed[-3000:]
    return {
        name: Pruned(
            prune(case["model"], case["recipe"], folder / "alone" / name),
            load_report(Path(case["output"])),
            folder / "alone" / name,
            Path(case["output"]),
        )
        for name, case in zip(CASES, cases, strict=True)
    }


def settings_of(change: dict[str, Any]) -> dict[str, Any]:
    """A recipe with five batches of two sequences, and one that is held back."""
    return recipe(**{"batch_size": 2, "held_back": 1, "calibration": {"samples": 9, "length": 24}, **change})


@pytest.mark.parametrize("name", CASES)
def test_several_processes_prune_what_one_prunes(pruned: dict[str, Pruned], name: str) -> None:
    case = pruned[name]
    alone, together = (tensors(folder) for folder in (case.alone_in, case.together_in))
    assert {key: value.shape for key, value in alone.items()} == {key: value.shape for key, value in together.items()}
    same = sum(int(((alone[key] == 0) == (together[key] == 0)).sum()) for key in alone)
    assert same >= 0.995 * sum(value.numel() for value in alone.values())
    one, other = ({row.name: (row.zeros, row.tokens) for row in report.rows} for report in (case.alone, case.together))
    assert one == other
    for row, twin in zip(case.alone.structures, case.together.structures, strict=True):
        assert (row.kept, row.tokens, row.removed) == (twin.kept, twin.tokens, twin.removed)
        assert row.error == (None if twin.error is None else pytest.approx(twin.error, rel=1e-2))
    for fit, again in zip(case.alone.matches, case.together.matches, strict=True):
        assert (fit.before, fit.after) == pytest.approx((again.before, again.after), rel=2e-2)


def test_perplexities_are_of_all_sequences(pruned: dict[str, Pruned]) -> None:
    one, other = (report.header["evaluation"] for report in (pruned["sparsegpt"].alone, pruned["sparsegpt"].together))
    for which in ("dense", "pruned"):
        assert one[which]["predicted_tokens"] == other[which]["predicted_tokens"]
        assert one[which]["perplexity"] == pytest.approx(other[which]["perplexity"], abs=0.05)
        assert one[which]["stderr"] == pytest.approx(other[which]["stderr"], rel=1e-2)
    assert one["dense"]["perplexity"] == pytest.approx(other["dense"]["perplexity"], rel=1e-6)
    assert one["kl_divergence"] == pytest.approx(other["kl_divergence"], rel=2e-2)


def test_the_same_number_of_processes_gives_the_same_bytes(pruned: dict[str, Pruned]) -> None:
    first = pruned["sparsegpt"].together_in
    shards = [name for name in contents(first) if name.endswith(".safetensors")]
    assert len(shards) == 5
    for name in shards:
        assert (first / name).read_bytes() == (first.parents[1] / "again" / name).read_bytes()


def test_an_expert_that_one_process_alone_has_seen_is_pruned(pruned: dict[str, Pruned]) -> None:
    alone, together = (
        {row.name: (row.tokens, row.prior_tokens) for row in report.rows if ".experts." in row.name}
        for report in (pruned["experts"].alone, pruned["experts"].together)
    )
    assert together == alone
    assert {1, 0} <= {tokens for tokens, _ in together.values()}, "one token is seen by one process"


def test_a_killed_process_ends_the_run_which_one_process_continues(tmp_path: Path, run_warm: FreshProcesses) -> None:
    source, output = save(build("llama", num_hidden_layers=4), tmp_path / "dense"), tmp_path / "out"
    case = {"model": str(source), "output": str(output), "recipe": settings_of({"method": "wanda"})}
    begun = time.monotonic()
    done = run_together(run_warm, tmp_path, [{**case, "killed": 1, "layers": 2}])
    assert done.status != 0
    assert time.monotonic() - begun < 100  # 30 s after the process died, on a busy machine
    assert "another process of this run has ended" in done.printed
    steps: list[Progress] = []
    report = prune(source, case["recipe"], output, resume=True, watch=steps.append)
    told = [step.stage for step in steps if "processes" in step.stage]
    assert told == ["begun with 2 processes, continued with 1: what is left may differ by rounding"]
    assert list(report.notes) == told
    assert told[0] in (output / "report.html").read_text("utf-8")
    assert report.sparsity == pytest.approx(0.5)
    assert len(report.rows) == 28


def test_held_back_samples_are_shared_out() -> None:
    for size, shares in ((1, [[4]]), (2, [[2], [2]]), (3, [[2], [2], []]), (6, [[1], [1], [1], [1], [], []])):
        found = [
            stream(build("llama"), random_ids(10, 4), held_back=4, batch_size=8, ranks=Ranks(rank, size))
            for rank in range(size)
        ]
        assert [[len(run.batches[batch]) for batch in run.validation] for run in found] == shares


def test_more_processes_than_batches_are_refused() -> None:
    settings = StreamSettings(batch_size=4, held_back=2, ranks=Ranks(0, 3))
    require_batches(settings, 14)
    with pytest.raises(CalibrationError, match="3 processes for 2 batches: 8 calibration sequences, 4 in") as caught:
        require_batches(settings, 10)
    assert caught.value.fix == "set batch_size to at most 2 (not with --resume), or start at most 2 processes"
    require_batches(replace(settings, batch_size=2), 10)
    with pytest.raises(CalibrationError, match="3 processes for 1 batch: 2 calibration") as caught:
        require_batches(settings, 4)
    assert caught.value.fix == "read 3 sequences or more (not with --resume), or start at most 1 process"
    require_batches(replace(settings, batch_size=1), 5)


def test_more_processes_than_batches_are_refused_before_any_text_is_sampled(tmp_path: Path) -> None:
    run = Run.begin(load_recipe(settings_of({})), ranks=Ranks(0, 6))
    with pytest.raises(CalibrationError, match="6 processes for 5 batches"):
        prune_checkpoint(run, "model", tmp_path / "model", tmp_path / "out")


def test_processes_that_differ_are_refused() -> None:
    own = {"source": "1f", "version": {"torch": "2.13.0"}, "device": "x86_64 CPU (AVX2), 4 threads"}
    require_same(own, {**own, "device": "x86_64 CPU (AVX2), 1 thread"}, 1)
    for changes, what in (
        ({"source": "2e"}, "process 3 has another checkpoint than the first one: 2e instead of 1f"),
        ({"version": {"torch": "2.14.0"}}, "process 3 has another set of versions"),
        ({"device": "x86_64 CPU (AVX512), 4 threads"}, "process 3 has another device"),
    ):
        with pytest.raises(DeviceError, match=what):
            require_same(own, {**own, **changes}, 3)


def test_a_group_without_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(DeviceError, match=r"initialised torch.distributed with cuda:nccl alone"):
        join("cuda")


def test_processes_without_a_gpu_each_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "auto"):
        with pytest.raises(DeviceError, match="4 processes on a machine with 2 visible") as caught:
            join(device)
        assert "at most 2" in caught.value.fix
    with pytest.raises(DeviceError, match="'cuda:1' for several processes"):
        join("cuda:1")


def test_a_process_without_memory_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {RuntimeError: PeerError, torch.OutOfMemoryError: torch.OutOfMemoryError}
    for raised, seen in failures.items():
        monkeypatch.setattr(
            "torch.distributed.broadcast", partial(_fail, raised("[/torch/pair.cc:5] closed by the peer. Look there."))
        )
        with pytest.raises(seen) as caught:
            Ranks(1, 2).send(torch.zeros(1), owner=0)
        assert str(caught.value).startswith("another process of this run has ended: closed by the peer\n") == (
            seen is PeerError
        )


def _fail(error: Exception, *arguments: Any, **options: Any) -> None:
    raise error


def test_the_number_of_processes_is_part_of_the_report(pruned: dict[str, Pruned]) -> None:
    case = pruned["chain"]
    assert case.together.header["host"]["processes"] == 2
    assert "processes" not in case.alone.header["host"]
    for page in ("README.md", "report.html"):
        told = [" --processes 2" in (folder / page).read_text("utf-8") for folder in (case.together_in, case.alone_in)]
        assert told == [True, False], page


def test_weights_that_depend_on_the_first_sequence_are_refused(tmp_path: Path) -> None:
    settings = load_recipe(settings_of({"statistics": {"token_weight": "clip"}}))
    run = Run.begin(settings, ranks=Ranks(0, 2))
    with pytest.raises(RecipeError, match="token_weight: clip in 2 processes"):
        prune_checkpoint(run, "model", tmp_path / "model", tmp_path / "out")
