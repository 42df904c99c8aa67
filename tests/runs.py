"""An uninterrupted run, and what every other way to its end must have in common with it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from folders import contents, tensors, untimed, weights_and_texts
from tiny_models import build, recipe, save
from transformers import AutoModelForCausalLM

from llmprune import prune
from llmprune.pruning import layers
from llmprune.pruning.writing import Writer
from llmprune.storage.files import INDEX_NAME, read_index
from llmprune.storage.folders import MANIFEST_NAME
from llmprune.storage.report import Report, load_report
from llmprune.stream.resident import ResidentLayer

LAYERS = 3


class Whole(NamedTuple):
    """An uninterrupted run."""

    source: Path
    recipe: dict[str, Any]
    folder: Path
    report: Report


@contextmanager
def uninterrupted(folder: Path, layers: int = LAYERS, *, evaluated: bool = True) -> Iterator[Whole]:
    """Prune a Llama in one go; its source must stay as it is."""
    model = build("llama", torch.bfloat16, num_hidden_layers=layers)
    source = save(model, folder / "dense")
    text = " ".join(f"w{number % 120 + 4}" for number in range(700))
    (folder / "text.txt").write_text(text)
    calibration = {"source": str(folder / "text.txt"), "samples": 4, "length": 16}
    # No prompts: two whole models would be loaded to answer them, after each of hundreds of kills.
    evaluation = {"samples": 1, "source": str(folder / "text.txt"), "prompts": []}
    settings = dict(recipe(calibration=calibration, evaluation=evaluation if evaluated else None))
    before = contents(source)
    report = prune(source, settings, folder / "pruned")
    yield Whole(source, settings, folder / "pruned", report)
    assert contents(source) == before


def note_solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are solved in this process, in order."""
    names: list[str] = []
    solve_layer = layers.solve_layer

    def note(layer: ResidentLayer, *arguments: Any) -> Any:
        rows = solve_layer(layer, *arguments)
        names.append(layer.name)
        return rows

    monkeypatch.setattr(layers, "solve_layer", note)
    return names


def stop_early(monkeypatch: pytest.MonkeyPatch, source: Path, settings: dict[str, Any], folder: Path) -> None:
    """Run a recipe, and interrupt it before the third layer is committed."""
    commit, seen = Writer.commit, list[Any]()

    def stop(self: Writer, *args: Any) -> None:
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        commit(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(source, settings, folder)


def assert_equal_to(whole: Whole, folder: Path, report: Report) -> None:
    assert weights_and_texts(folder) == weights_and_texts(whole.folder)
    assert untimed(report) == untimed(whole.report)
    assert untimed(load_report(folder)) == untimed(whole.report)
    assert json.loads((folder / MANIFEST_NAME).read_text())["complete"] is True


def assert_incomplete_or_whole(whole: Whole, folder: Path) -> None:
    """Nobody mistakes an unfinished folder for a model."""
    if (folder / INDEX_NAME).exists():
        assert list(read_index(folder)) == list(read_index(whole.folder))
        assert {name: tensor.tolist() for name, tensor in tensors(folder).items()} == {
            name: tensor.tolist() for name, tensor in tensors(whole.folder).items()
        }
    else:
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)


# --- killed at every change that a run makes to its folder
