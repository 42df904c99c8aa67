"""Sweeps that several processes make together."""

from pathlib import Path

import pytest
from filelock import FileLock
from sweeps import GRID, NAMES, on_text, states, stop_at, write_text
from tiny_models import build, save

from llmprune.errors import DeviceError, RecipeError, ResumeError
from llmprune.progress import Progress
from llmprune.pruning.sweep import shards
from llmprune.pruning.sweep.cluster import _parameters, submit
from llmprune.pruning.sweep.ledger import JOBS_NAME
from llmprune.pruning.sweep.shards import Shard
from llmprune.pruning.sweep.sweep import sweep
from llmprune.storage.folders import LOCK_NAME


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return save(build("llama"), tmp_path_factory.mktemp("shards") / "dense")


def test_shards_are_read() -> None:
    assert Shard.parse("2/8") == Shard(2, 8)
    assert str(Shard(2, 8)) == "2/8"
    assert [place for place in range(7) if Shard(2, 3).has(place)] == [1, 4]
    for text in ("0/2", "3/2", "1", "a/b", "-1/2", "1/0", ""):
        with pytest.raises(RecipeError, match="shard"):
            Shard.parse(text)


def test_an_interrupted_shard_continues_and_leaves_the_others_alone(model: Path, tmp_path: Path) -> None:
    settings, output = on_text(write_text(tmp_path)), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, settings, GRID, output, shard=Shard(1, 2), watch=stop_at("1/2 pruning", 1))
    assert states(output) == dict(zip(NAMES, ("interrupted", "waiting", "waiting", "waiting"), strict=True))
    made = sweep(model, settings, GRID, output, shard=Shard(1, 2))
    assert [row.state for row in made.rows] == ["finished", "finished"]
    assert states(output) == dict(zip(NAMES, ("finished", "waiting", "finished", "waiting"), strict=True))


def test_a_run_that_another_process_makes_is_left_to_it(model: Path, tmp_path: Path) -> None:
    settings, output = on_text(write_text(tmp_path)), tmp_path / "out"
    told = list[Progress]()
    sweep(model, settings, GRID, output, shard=Shard(5, 6))  # begins it
    (output / NAMES[0]).mkdir()
    with FileLock(output / NAMES[0] / LOCK_NAME):
        made = sweep(model, settings, GRID, output, shard=Shard(1, 2), watch=told.append)
    assert [row.state for row in made.rows] == ["running", "finished"]
    assert made.failed == ()
    left = f"run 1 of 2 is left to the process that makes it: {NAMES[0]}"
    assert left in [step.stage for step in told]


def test_a_shard_without_runs_says_so(model: Path, tmp_path: Path) -> None:
    told = list[Progress]()
    made = sweep(model, on_text(write_text(tmp_path)), GRID, tmp_path / "out", shard=Shard(5, 6), watch=told.append)
    assert made.rows == ()
    assert [step.stage for step in told] == ["nothing to do: shard 5/6 has none of the 4 runs"]


def test_a_sweep_that_keeps_others_out_is_waited_for_and_then_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_PATIENCE_SECONDS", 0.1)
    output = tmp_path / "out"
    output.mkdir()
    with FileLock(output / LOCK_NAME), pytest.raises(ResumeError, match="another run of llmprune is writing"):
        sweep(model, on_text(write_text(tmp_path)), GRID, output, shard=Shard(1, 2))
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match="holds files but no sweep"):
        sweep(model, on_text(write_text(tmp_path)), GRID, output, shard=Shard(1, 2))
    with pytest.raises(ResumeError, match="overwrite with a shard"):
        sweep(model, on_text(write_text(tmp_path)), GRID, output, shard=Shard(1, 2), overwrite=True)


def test_jobs_at_the_same_time_make_the_whole_sweep(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    settings, output = on_text(write_text(tmp_path)), tmp_path / "out"
    jobs = submit(str(model), settings, GRID, output, 2, {"time": "10"}, cluster="local")
    assert [job.result() for job in jobs] == [[], []]
    for job in jobs:
        job._process.wait()  # it has written its result, and is about to end
    assert states(output) == dict.fromkeys(NAMES, "finished")
    assert (output / JOBS_NAME).is_dir()
    whole = sweep(model, settings, GRID, output, resume=True)
    assert whole.comparison is not None
    assert len(whole.comparison.rows) == 1 + len(NAMES)


def test_options_of_jobs_are_named_as_submitit_names_them() -> None:
    options = {"time": "60", "gpus": "1", "partition": "long", "reservation": "mine"}
    assert _parameters(options) == {
        "timeout_min": 60,
        "gpus_per_node": 1,
        "slurm_additional_parameters": {"partition": "long", "reservation": "mine"},
    }
    with pytest.raises(RecipeError, match="time=soon"):
        _parameters({"time": "soon"})


def test_without_slurm_nothing_is_started_here_instead(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    output = tmp_path / "out"
    with pytest.raises(DeviceError, match="the jobs cannot be submitted") as caught:
        submit(str(model), on_text(write_text(tmp_path)), GRID, output, 2, {"partition": "long"})
    assert "--shard" in caught.value.fix
    assert not output.exists()
