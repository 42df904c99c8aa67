"""Experiment trackers: what they are told, and what happens without their package."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from report_rows import row
from tiny_models import build, recipe, save, tokenizer

import llmprune.pruning.tracking as tracking
from llmprune import Report, prune
from llmprune.errors import MissingPackageError, RecipeError
from llmprune.pruning.tracking import final_figures


class Recorder(GeneralTracker):  # type: ignore[misc] # accelerate is not typed
    """Stands in for a service: keeps what it is told."""

    name = "wandb"
    requires_logging_directory = False
    told: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.told.append(("project", run_name))

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.told.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("settings", values))

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.told.append(("log", (step, values)))

    def finish(self) -> None:
        self.told.append(("finish", None))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())
    monkeypatch.setattr(Recorder, "told", [])
    return Recorder.told


def test_layers_and_totals_are_logged(recorder: list[tuple[str, Any]], tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    settings = recipe(report_to="wandb", evaluation={"samples": 1, "prompts": []})
    report = prune(source, settings, tmp_path / "out")
    assert [kind for kind, _ in recorder] == ["project", "start", "settings", "log", "log", "log", "finish"]
    said = recorder[2][1]
    assert (said["model"], said["pattern"], said["calibration.samples"]) == (str(source), "0.5", 6)
    (first, values), (second, _), (last, totals) = (value for kind, value in recorder if kind == "log")
    assert (first, second, last) == (0, 1, 1)
    assert len(values) == 2 * 7
    assert values["relative_output_error/mlp.up_proj"] == next(
        row.error for row in report.rows if row.name == "model.layers.0.mlp.up_proj"
    )
    assert totals == final_figures(report)
    assert totals["final/perplexity"] == report.pruned_perplexity
    recorder.clear()
    prune(build("llama"), recipe(report_to="wandb"), tokenizer=tokenizer())
    assert recorder[-1] == ("finish", None)
    recorder.clear()
    prune(build("llama"), recipe(), tokenizer=tokenizer())
    assert recorder == []


def test_a_service_that_fails_does_not_end_a_finished_run(
    recorder: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Recorder) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(Recorder, "start", refuse)
    said: list[str] = []
    prune(
        save(build("llama"), tmp_path / "dense"),
        recipe(report_to="wandb", method="magnitude"),
        tmp_path / "out",
        watch=lambda progress: said.append(progress.stage),
    )
    assert (tmp_path / "out" / "report.json").exists()
    assert said[-1].startswith("the result is complete, but report_to: wandb failed: no API key")


def test_what_is_not_finite_is_no_figure() -> None:
    evaluation = {"dense": {"perplexity": 20.0}, "pruned": {"perplexity": None}, "kl_divergence": None}
    found = final_figures(Report((row(),), {"evaluation": evaluation}))
    assert found == {
        "final/sparsity": 0.5,
        "final/mean_relative_output_error": 0.25,
        "final/dense_perplexity": 20.0,
    }


def test_a_missing_package_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard", "mlflow"):
        with pytest.raises(MissingPackageError, match=f"report_to: {name} needs the package {name}") as caught:
            prune(tmp_path / "no-model", recipe(report_to=name), tmp_path / "out")
        assert caught.value.fix == f"pip install {name}"
    with pytest.raises(RecipeError, match="report_to"):
        prune(tmp_path / "no-model", recipe(report_to="excel"), tmp_path / "out")


def test_tensorboard_writes_beside_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="its own files are read back")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = build("llama")
    report = prune(model, recipe(report_to="tensorboard"), tmp_path / "out", tokenizer=tokenizer())
    events = EventAccumulator(str(tmp_path / "out" / "llmprune"))
    events.Reload()
    assert {"sparsity/mlp.up_proj", "final/sparsity"} <= set(events.Tags()["scalars"])
    assert events.Scalars("final/sparsity")[0].value == pytest.approx(report.sparsity)
    assert [event.step for event in events.Scalars("sparsity/mlp.up_proj")] == [0, 1]
