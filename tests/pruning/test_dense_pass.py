"""Runs that share what they make of the dense model are, to the bit, those that share nothing."""

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from folders import untimed, weights_and_texts
from front_door import unchanged
from sweeps import GRID, on_text, write_text

from llmprune import prune
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.models.source import ModelSource
from llmprune.progress import ignore
from llmprune.pruning import dense_pass
from llmprune.pruning.dense_pass import DensePass
from llmprune.pruning.sweep.sweep import Sweep, sweep
from llmprune.storage.report import Report, load_report
from llmprune.stream.stream import StreamSettings
from llmprune.text.tokens import Tokens
from llmprune.timing import Stages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with unchanged(tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))) as folder:
        yield folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_text(write_text(tmp_path_factory.mktemp("text")))


def unmeasured(report: Report) -> dict[str, Any]:
    """A report without what is measured anew in every run of a model that becomes smaller, too."""
    content = untimed(report)
    content.pop("speed", None)
    return {**content, "structures": [{**row, "seconds": 0, "peak_bytes": 0} for row in content["structures"]]}


def assert_separate_runs_are_equal(model: Path, recipe: Mapping[str, Any], found: Sweep, folder: Path) -> None:
    for row in found.rows:
        report = prune(model, row.recipe, folder / row.name)
        made = Path(found.folder) / row.name
        assert weights_and_texts(made) == weights_and_texts(folder / row.name)
        assert unmeasured(load_report(made)) == unmeasured(report)
        assert report.dense_perplexity is not None
    assert len({json.dumps(load_report(folder / row.name).header["evaluation"]) for row in found.rows}) > 1


@pytest.mark.parametrize(
    ("grid", "passes"),
    [
        (GRID, 1),
        # Hidden states on the disk.
        ({"pattern": [0.5, 0.6], "activation_budget": [0]}, 1),
        # In this order each pass would be needed twice.
        ({"pattern": [0.5, 0.6], "compute_dtype": ["float32", "bfloat16"]}, 2),
        ({"evaluation.order": ["text", "shuffled"], "pattern": [0.5, 0.6]}, 2),
        # Smaller models, whose heads are other ones than the dense model's.
        ({"structures": [None, {"ffn": {"remove": 0.25}}, {"width": {"remove": 0.25}}]}, 1),
    ],
    ids=["plain", "spilled", "dtypes", "texts", "structures"],
)
def test_runs_share_the_dense_pass_and_are_those_of_prune(
    model: Path,
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grid: dict[str, Any],
    passes: int,
) -> None:
    streams, texts = [], []
    run_stream, load_texts = dense_pass.run_stream, dense_pass.load_texts
    with monkeypatch.context() as patched:
        patched.setattr(dense_pass, "run_stream", lambda *given: (streams.append(given), run_stream(*given))[1])
        patched.setattr(
            dense_pass, "load_texts", lambda specs, *given: (texts.extend(specs), load_texts(specs, *given))[1]
        )
        found = sweep(model, recipe, grid, tmp_path / "grid")
    assert len(streams) == passes
    assert sorted(texts) == ["calibration", *["evaluation"] * (1 + ("evaluation.order" in grid))]
    assert_separate_runs_are_equal(model, recipe, found, tmp_path)


def test_text_that_the_model_writes_is_written_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    load_texts = dense_pass.load_texts
    settings = tiny_models.recipe(evaluation={"samples": 2})
    with monkeypatch.context() as patched:
        patched.setattr(
            dense_pass, "load_texts", lambda specs, *more: (written.extend(specs), load_texts(specs, *more))[1]
        )
        found = sweep(model, settings, {"method": ["wanda", "magnitude"], "held_back": [1]}, tmp_path / "grid")
    assert written == ["calibration", "evaluation"]
    assert_separate_runs_are_equal(model, settings, found, tmp_path)


def tokens() -> dict[str, Tokens]:
    return {"evaluation": Tokens(tiny_models.random_ids(3, 12), "", {})}


def test_one_dense_pass_is_kept_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, source = DensePass(), CheckpointSource(model)

    def final(batch_size: int) -> Any:
        return dense.final_states(source, tokens(), StreamSettings(batch_size=batch_size), ignore, Stages()).hidden

    first = final(2)
    assert final(2) is first
    gone = weakref.ref(first)
    del first
    run_stream = dense_pass.run_stream
    freed: list[bool] = []
    monkeypatch.setattr(dense_pass, "run_stream", lambda *given: (freed.append(gone() is None), run_stream(*given))[1])
    final(3)
    assert freed == [True]


def test_a_model_in_memory_is_never_taken_for_the_same(model: Path) -> None:
    dense, source = DensePass(), ModelSource(tiny_models.build("llama"))
    settings = StreamSettings(batch_size=2)
    first, second = (dense.final_states(source, tokens(), settings, ignore, Stages()) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.hidden is not second.hidden
    assert torch.equal(first.hidden[0], second.hidden[0])
    assert dense.final_states(source, {}, settings, ignore, Stages()) is None
