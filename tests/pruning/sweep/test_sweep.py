"""A sweep: what comes out, how it goes on, what it refuses, and what it would take."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from folders import contents, weights_and_texts
from front_door import unchanged
from runs import note_solved
from sweeps import GRID, NAMES, on_text, states, stop_at, write_text

from llmprune import dry_run
from llmprune.errors import CalibrationError, CheckpointError, PatternError, RecipeError, ResumeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pruning.sweep import sweep as sweeping
from llmprune.pruning.sweep.sweep import Sweep, forecast, sweep
from llmprune.storage.folders import locked
from llmprune.storage.report import load_report


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with unchanged(tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))) as folder:
        yield folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def recipe(text: Path) -> dict[str, Any]:
    return on_text(text)


@pytest.fixture(scope="module")
def whole(model: Path, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(model, recipe, GRID, tmp_path_factory.mktemp("whole") / "grid")


@pytest.fixture
def copy(whole: Sweep, tmp_path: Path) -> Path:
    """The finished sweep, to be damaged or continued."""
    return Path(shutil.copytree(whole.folder, tmp_path / "copy"))


# --- what comes out


def test_rows_and_record(whole: Sweep) -> None:
    folder = Path(whole.folder)
    assert [row.name for row in whole.rows] == NAMES
    assert whole.rows[3].settings == {"pattern": "2:4", "method": "magnitude"}
    assert whole.rows[3].recipe == load_report(folder / NAMES[3]).header["recipe"]
    assert states(folder) == dict.fromkeys(NAMES, "finished")
    assert whole.failed == ()
    assert sorted(file.name for file in folder.iterdir()) == sorted([*NAMES, "sweep.json"])


def test_the_end_is_a_comparison_with_the_dense_model(whole: Sweep, model: Path) -> None:
    assert whole.comparison is not None
    rows = {row.name: row for row in whole.comparison.rows}
    assert list(rows) == [model.name, *NAMES]
    reports = [load_report(Path(whole.folder) / name) for name in NAMES]
    assert [rows[name].perplexity for name in NAMES] == [report.pruned_perplexity for report in reports]
    assert rows[model.name].perplexity == reports[0].dense_perplexity
    content = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert content["comparison"] == json.loads(json.dumps(whole.comparison.to_dict()))
    assert [row["state"] for row in content["rows"]] == ["finished"] * 4


def test_a_watcher_hears_which_run_of_how_many(model: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    heard: list[str] = []
    asked = {**recipe, "evaluation": {**recipe["evaluation"], "prompts": ["w5"]}}
    sweep(model, asked, {"pattern": [0.5, 0.6]}, tmp_path / "grid", watch=lambda p: heard.append(p.stage))
    assert list(dict.fromkeys(heard)) == [
        *("run 1 of 2: pattern-0.5", "1/2 evaluation text", "1/2 calibration text", "1/2 digesting the source"),
        *("1/2 dense perplexity", "1/2 pruning", "1/2 writing what is outside the layers"),
        *("1/2 pruned perplexity", "1/2 perplexity, head", "1/2 answers", "1/2 writing the report"),
        *("run 2 of 2: pattern-0.6", "2/2 evaluation text", "2/2 calibration text", "2/2 digesting the source"),
        *(
            "2/2 dense perplexity: the same as in an earlier run",
            "2/2 pruning",
            "2/2 writing what is outside the layers",
            "2/2 pruned perplexity",
            "2/2 perplexity, head",
            "2/2 answers",
            "2/2 writing the report",
        ),
    ]


# --- what goes wrong


def test_a_run_that_fails_stops_no_other(model: Path, recipe: dict[str, Any], text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w5 w6")
    grid = {"calibration.source": [str(short), str(text)], "pattern": [0.5, 0.6]}
    heard: list[str] = []
    found = sweep(model, recipe, grid, tmp_path / "grid", watch=lambda p: heard.append(p.stage))
    assert [row.state for row in found.rows] == ["failed", "failed", "finished", "finished"]
    assert found.failed == found.rows[:2]
    error = found.rows[0].error
    assert error is not None
    assert error["kind"] == CalibrationError.__name__
    assert "2 tokens in 1 documents" in error["what"]
    assert error["fix"]
    assert list(states(tmp_path / "grid").values()) == ["failed", "failed", "finished", "finished"]
    assert f"run 1 of 4 failed: {error['what']}" in heard
    assert found.comparison is not None
    assert len(found.comparison.rows) == 3
    shutil.copyfile(text, short)
    mended = sweep(model, recipe, grid, tmp_path / "grid", resume=True)
    assert [(row.state, row.error) for row in mended.rows] == [("finished", None)] * 4


def test_without_a_finished_run_there_is_no_comparison(model: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    found = sweep(model, recipe, {"pattern": ["3:7", "3:5"]}, tmp_path / "grid")
    assert [row.error and row.error["kind"] for row in found.rows] == [PatternError.__name__] * 2
    assert found.comparison is None
    assert found.to_dict()["comparison"] is None


def test_bad_combinations_are_refused_before_anything_is_written(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="2 of 3 combinations cannot be run:"):
        sweep(model, recipe, {"pattern": [0.5, 1.5, "a:b"]}, tmp_path / "grid")
    with pytest.raises(ResumeError, match="is the model itself"):
        sweep(model, recipe, GRID, model)
    assert contents(tmp_path) == {}


def test_a_defect_of_ours_is_no_failed_run(
    model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "prune_checkpoint", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep(model, recipe, GRID, tmp_path / "grid")


# --- going on


def test_an_interrupted_sweep_goes_on_within_the_run(
    model: Path, recipe: dict[str, Any], whole: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "grid"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, recipe, GRID, folder, watch=stop_at("2/4 pruning", 1))
    assert list(states(folder).values()) == ["finished", "interrupted", "waiting", "waiting"]
    solved = note_solved(monkeypatch)
    found = sweep(model, recipe, GRID, folder, resume=True)
    assert solved == [f"model.layers.{layer}" for layer in (1, 0, 1, 0, 1)]
    assert [row.state for row in found.rows] == ["finished"] * 4
    for name in NAMES:
        assert weights_and_texts(folder / name) == weights_and_texts(Path(whole.folder) / name)


def test_finished_runs_are_not_made_again(
    model: Path, recipe: dict[str, Any], whole: Sweep, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copy)
    monkeypatch.setattr(CheckpointSource, "load_layer", None)
    assert sweep(model, recipe, GRID, copy, resume=True).rows == whole.rows
    assert contents(copy) == before


def test_a_finished_run_stays_finished_when_its_check_is_interrupted(
    model: Path, recipe: dict[str, Any], copy: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(model, recipe, GRID, copy, resume=True, watch=stop_at("1/4 calibration text", 0))
    assert set(states(copy).values()) == {"finished"}


def test_another_grid_adds_runs_and_keeps_the_finished_ones(
    model: Path, recipe: dict[str, Any], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = note_solved(monkeypatch)
    # One of these is there, under a name that tells the method, too.
    found = sweep(model, recipe, {"pattern": [0.5, 0.75]}, copy, resume=True)
    assert [row.name for row in found.rows] == ["pattern-0.5_wanda", "pattern-0.75", *NAMES[1:]]
    assert len(solved) == 2
    assert list(states(copy)) == ["pattern-0.5_wanda", "pattern-0.75", *NAMES[1:]]
    assert found.comparison is not None
    assert len(found.comparison.rows) == 6


def test_what_another_grid_left_unfinished_is_remembered_and_not_shown(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(model, recipe, GRID, tmp_path / "grid", watch=stop_at("2/4 pruning", 1))
    found = sweep(model, recipe, {"pattern": [0.75]}, tmp_path / "grid", resume=True)
    assert [row.name for row in found.rows] == ["run", "pattern-0.5_wanda"]
    assert states(tmp_path / "grid") == {"run": "finished", NAMES[0]: "finished", NAMES[1]: "interrupted"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, "pattern-0.5_wanda cannot be resumed: batch_size was 2 and is now 3"),
        ({"calibration.samples": 2}, "calibration.samples was 3 and is now 2"),
        ({"source": True}, "cannot be resumed: source was .* and is now "),
        ({"version": True}, "cannot be resumed: version.llmprune was .* and is now '9'"),
        ({"text": True}, "cannot be resumed: tokens.calibration was"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_changed_sweep_is_refused_by_name(
    model: Path,
    recipe: dict[str, Any],
    text: Path,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    named: str,
) -> None:
    before, original = contents(copy), text.read_text()
    fixed = {key: [value] for key, value in change.items() if value is not True}
    if "source" in change:
        model = tiny_models.save(tiny_models.build("llama", num_hidden_layers=3), copy.parent / "other")
    if "version" in change:
        known = sweeping.versions()
        monkeypatch.setattr(sweeping, "versions", lambda: {**known, "llmprune": "9"})
    text.write_text("w9 " * ("text" in change) + original)
    try:
        with pytest.raises(ResumeError, match=named):
            sweep(model, recipe, {**GRID, **fixed}, copy, resume=True)
    finally:
        text.write_text(original)
    assert contents(copy) == before


def test_a_refusal_leaves_the_record_as_it_was(model: Path, recipe: dict[str, Any], text: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(model, recipe, GRID, tmp_path / "grid", watch=stop_at("1/4 pruning", 1))
    before, original = contents(tmp_path), text.read_text()
    text.write_text("w9 " + original)
    try:
        with pytest.raises(ResumeError, match=r"tokens\.calibration was"):
            sweep(model, recipe, GRID, tmp_path / "grid", resume=True)
    finally:
        text.write_text(original)
    assert contents(tmp_path) == before
    assert states(tmp_path / "grid")[NAMES[0]] == "interrupted"


def test_what_was_never_begun_stands_in_nobodys_way(model: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    assert sweep(model, recipe, {"calibration.length": [8000], **GRID}, tmp_path / "grid").comparison is None
    found = sweep(model, recipe, {"calibration.length": [16], **GRID}, tmp_path / "grid", resume=True)
    assert [row.state for row in found.rows] == ["finished"] * 4


# --- the folder


def test_a_folder_with_something_in_it_is_refused(model: Path, recipe: dict[str, Any], copy: Path) -> None:
    before = contents(copy.parent)
    with pytest.raises(ResumeError, match=r"holds a sweep.*\nexpected.*\nfix: continue it with --resume, or replace"):
        sweep(model, recipe, GRID, copy)
    with pytest.raises(ResumeError, match="contradict"):
        sweep(model, recipe, GRID, copy, resume=True, overwrite=True)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        for folder in (copy.parent, copy / NAMES[0]):
            with pytest.raises(ResumeError, match="holds files but no sweep"):
                sweep(model, recipe, GRID, folder, **options)
        with pytest.raises(ResumeError, match="is a file"):
            sweep(model, recipe, GRID, copy / "sweep.json", **options)
    with locked(copy), pytest.raises(ResumeError, match="another run of llmprune is writing into"):
        sweep(model, recipe, GRID, copy, resume=True)
    assert contents(copy.parent) == before


def test_overwriting_replaces_all_runs_and_nothing_else(model: Path, recipe: dict[str, Any], copy: Path) -> None:
    (copy / NAMES[1] / "notes.txt").write_text("mine")
    found = sweep(model, recipe, {"pattern": [0.75], "method": ["wanda"]}, copy, overwrite=True)
    assert sorted(file.name for file in copy.iterdir()) == sorted([NAMES[1], "run", "sweep.json"])
    assert contents(copy / NAMES[1]) == {"notes.txt": b"mine"}
    assert [row.name for row in found.rows] == ["run"]
    assert states(copy) == {"run": "finished"}


def test_overwriting_exchanges_each_run_when_the_new_one_is_whole(
    model: Path, recipe: dict[str, Any], copy: Path
) -> None:
    """Ctrl-C in the second run: the first is new, and all others are as they were; the sweep can be resumed."""
    before = {name: weights_and_texts(copy / name) for name in NAMES}
    changed, grid = {**recipe, "held_back": 0}, {"pattern": [0.5, "2:4"], "method": ["magnitude", "random"]}
    with pytest.raises(KeyboardInterrupt):
        sweep(model, changed, grid, copy, overwrite=True, watch=stop_at("3/4 pruning", 1))
    assert load_report(copy / NAMES[1]).header["recipe"]["held_back"] == 0
    for name in (NAMES[0], NAMES[2], NAMES[3]):
        there = weights_and_texts(copy / name)
        assert {file: there[file] for file in before[name]} == before[name]
    assert states(copy) == {
        NAMES[1]: "finished", "pattern-0.5_random": "finished", NAMES[3]: "interrupted",
        "pattern-2of4_random": "waiting", NAMES[0]: "replaced", NAMES[2]: "replaced",
    }  # fmt: skip
    found = sweep(model, changed, grid, copy, resume=True)
    new = [NAMES[1], "pattern-0.5_random", NAMES[3], "pattern-2of4_random"]
    assert [row.name for row in found.rows] == new
    assert states(copy) == dict.fromkeys(new, "finished")
    assert sorted(file.name for file in copy.iterdir()) == sorted([*new, "sweep.json"])
    assert all(load_report(copy / name).header["recipe"]["held_back"] == 0 for name in new)


def test_a_sweep_that_fails_removes_nothing_of_the_one_it_was_to_replace(
    model: Path, recipe: dict[str, Any], copy: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w5 w6")
    broken = {**recipe, "calibration": {**recipe["calibration"], "source": str(short)}}
    before = {name: contents(copy / name) for name in NAMES}
    found = sweep(model, broken, {"pattern": [0.5], "method": ["wanda", "random"]}, copy, overwrite=True)
    assert [row.state for row in found.rows] == ["failed", "failed"]
    assert {name: contents(copy / name) for name in NAMES} == before


@pytest.mark.parametrize("option", ["resume", "overwrite"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 9, "keys": {}, "runs": []}', "format 9 instead of 1"),
        ('{"format": 1, "keys": {}, "runs": [{"name": "a"}]}', "cannot be read"),
        (
            '{"format": 1, "keys": {}, "runs": [{"name": "../victim", "settings": {}, "recipe": {}}]}',
            "not a valid name",
        ),
        ('{"format": 1, "keys": {}, "runs": [{"name": "..", "settings": {}, "recipe": {}}]}', "not a valid name"),
    ],
)
def test_a_damaged_record_is_a_typed_error(
    model: Path, recipe: dict[str, Any], tmp_path: Path, option: str, content: str, said: str
) -> None:
    (tmp_path / "grid").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "model.safetensors").touch()
    (tmp_path / "grid" / "sweep.json").write_text(content)
    before = contents(tmp_path)
    with pytest.raises(ResumeError, match=said):
        sweep(model, recipe, GRID, tmp_path / "grid", **{option: True})
    assert contents(tmp_path) == before


# --- what it would take


def test_a_forecast_is_that_of_each_run(model: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    grid = {"structures": [None, {"ffn": {"remove": 0.5}}], "batch_size": [2, 4]}
    found = forecast(model, recipe, grid, tmp_path / "grid")
    assert [row.name for row in found.rows] == [
        *("structures-null_batch_size-2", "structures-ffn-remove-0.5_batch_size-2"),
        *("structures-null_batch_size-4", "structures-ffn-remove-0.5_batch_size-4"),
    ]
    plans = [
        dry_run(model, recipe, [f"{key}={json.dumps(v)}" for key, v in row.settings.items()]) for row in found.rows
    ]
    assert [row.peak_bytes for row in found.rows] == [plan.memory.peak for plan in plans]
    assert [row.disk_bytes for row in found.rows] == [plan.disk_bytes for plan in plans]
    assert found.rows[0].disk_bytes > found.rows[1].disk_bytes
    assert found.disk_bytes == sum(plan.disk_bytes for plan in plans)
    assert found.peak_bytes == max(plan.memory.peak for plan in plans)
    assert found.seconds == sum(row.seconds for row in found.rows) > 0
    assert json.loads(json.dumps(found.to_dict()))["disk_bytes"] == found.disk_bytes
    assert contents(tmp_path) == {}


def test_a_forecast_leaves_out_what_is_finished(model: Path, recipe: dict[str, Any], copy: Path) -> None:
    found = forecast(model, recipe, {"pattern": [0.5, 0.75]}, copy, resume=True)
    assert [(row.name, row.finished) for row in found.rows] == [("pattern-0.5_wanda", True), ("pattern-0.75", False)]
    assert (found.rows[0].seconds, found.rows[0].disk_bytes) == (0, 0)
    with pytest.raises(ResumeError, match="holds a sweep"):
        forecast(model, recipe, GRID, copy)


def test_a_forecast_refuses_all_that_does_not_fit_at_once(
    model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="2 of 3 combinations cannot be run") as caught:
        forecast(model, recipe, {"pattern": [0.5, "3:7", "3:5"]})
    assert "pattern 3:7" in str(caught.value)
    assert "pattern 3:5" in str(caught.value)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 20_200_000}))
    forecast(model, recipe, {"pattern": [0.5]}, tmp_path / "grid")
    with pytest.raises(CheckpointError, match="are free under"):
        forecast(model, recipe, GRID, tmp_path / "grid")
