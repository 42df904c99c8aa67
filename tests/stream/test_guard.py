"""Memory that runs out is explained: where it was, how much is needed, what to change, and how to go on."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import SMALL, make_plain, run
from folders import weights_and_texts

from llmprune import Recipe, dry_run, load_recipe, prune
from llmprune.devices import is_shortage
from llmprune.errors import DeviceError
from llmprune.precision import computed_in
from llmprune.pruning import layers
from llmprune.stream import stream
from llmprune.stream.guard import MemoryGuard
from llmprune.stream.resident import ResidentLayer
from llmprune.stream.stream import StreamSettings

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")
ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def small() -> Recipe:
    return load_recipe("demo", [part for part in SMALL if part != "--set"])


def failing(error: BaseException, original: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Fails instead of the call of this number, counted from 0."""
    calls = iter(range(1000))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise error
        return original(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GPU, True),
        (ALLOCATOR, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_shortages_are_recognised(error: BaseException, expected: bool) -> None:
    assert is_shortage(error) is expected
    with pytest.raises(DeviceError if expected else type(error)) as caught, MemoryGuard(StreamSettings()):
        raise error
    assert caught.value.__cause__ is (error if expected else None)


def test_what_the_allocator_says_is_recognised() -> None:
    with pytest.raises(DeviceError, match="the memory of this machine ran out"), MemoryGuard(StreamSettings()):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GPU, ["the memory of the GPU ran out", "CUDA out of memory. Tried", "device: cpu, or stop other programs"]),
        (
            ALLOCATOR,
            ["the memory of this machine ran out", "can't allocate memory", "activation_budget (it is 4.3 GB"],
        ),
        (MemoryError(), ["the memory of this machine ran out", "activation_budget"]),
    ],
)
def test_a_run_out_of_memory_says_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: list[str]
) -> None:
    arguments = ["prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL]
    with monkeypatch.context() as patched:
        patched.setattr(layers, "solve_layer", failing(error, layers.solve_layer, 1))
        result = run(*arguments, "--json")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    explained = json.loads(result.stdout)["error"]
    assert explained["kind"] == "DeviceError"
    for words in (*said, "pruning, layer 2 of 2, statistics", "batch_size (it is 2)", "--resume", "--overwrite"):
        assert words in "\n".join(explained.values())
        assert words in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("with more memory, continue with: llmprune prune ")
    resumed = run(*shlex.split(last.partition("llmprune ")[2]))
    assert resumed.exit_code == 0
    assert "layer 1 of 2 kept from the earlier run" in resumed.stderr
    straight = run(*arguments[:4], "--output", tmp_path / "straight", *SMALL)
    assert straight.exit_code == 0
    assert weights_and_texts(tmp_path / "out") == weights_and_texts(tmp_path / "straight")


def test_the_need_is_an_upper_bound_of_the_formula(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = dry_run("testbed", small).memory.peak / 1e6
    monkeypatch.setattr(ResidentLayer, "observe", failing(MemoryError(), ResidentLayer.observe, 0))
    with pytest.raises(DeviceError) as caught:
        prune("testbed", small, tmp_path / "out")
    found = re.fullmatch(r"up to ([\d.]+) MB for pruning, .*, and ([\d.]+) MB for .* logits .*", caught.value.expected)
    assert found is not None
    assert peak <= float(found[1]) + 0.1 <= 1.5 * peak
    itemsize = computed_in(torch.bfloat16, torch.device("cpu")).itemsize
    # Two models' logits as computed, as float32 and their log-softmax, and the divergence of one from the other.
    ends, logits = (2 * 4096 * 256 + 256) * itemsize, 2 * 24 * 4096 * (2 * (itemsize + 8) + 8)
    assert float(found[2]) == pytest.approx((ends + logits) / 1e6, abs=0.1)


def test_sampling_text_says_that_the_model_is_loaded_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.text.loading.generate_text", failing(MemoryError(), pytest.fail, 0))
    result = run("prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL)
    assert result.exit_code == 1
    assert "Error: the memory of this machine ran out: sampling text, token 1 of 216" in result.stderr
    assert "for the whole dense model, which generates the text" in result.stderr
    assert "continue with" not in result.stderr
    assert "--resume" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--dry-run"], []], ids=["dry run", "run"])
def test_a_first_batch_that_does_not_fit_is_explained(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(stream.Stream, "capture", failing(GPU, pytest.fail, 0))
    result = run("prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL, *arguments)
    assert result.exit_code == 1
    assert "ran out" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_in_memory_has_nothing_to_resume(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "solve_layer", failing(MemoryError(), pytest.fail, 0))
    with pytest.raises(DeviceError, match="pruning, layer 1 of 2") as caught:
        prune(tiny_models.build("llama"), small, tokenizer=tiny_models.tokenizer())
    assert "--resume" not in caught.value.fix


def test_perplexity_out_of_memory_is_explained(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w50 w60 " * 40)
    monkeypatch.setattr(stream.Stream, "head", failing(ALLOCATOR, pytest.fail, 0))
    result = run("perplexity", model, "--text", text, "--length", 16, "--samples", 2)
    assert result.exit_code == 1
    assert "ran out: perplexity, head: [enforce fail" in result.stderr
    assert "B for the embeddings, the LM head and the logits of " in result.stderr
    assert "batch_size (it is 8)" in result.stderr
