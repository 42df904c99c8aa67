"""`llmprune pack`, `llmprune unpack`, and packed checkpoints under the other commands."""

import json
from pathlib import Path

import pytest
from command_line import run
from folders import same, tensors
from packed_models import save_packed
from tiny_models import build, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_packed(tmp_path)


def test_pack_and_unpack_are_a_way_there_and_back(folder: Path) -> None:
    packed = run("pack", folder / "dense")
    assert packed.exit_code == 0, packed.stderr
    assert "nm" in packed.stdout
    assert "0.5625" in packed.stdout
    unpacked = run("unpack", folder / "dense-packed", "--output", folder / "again", "--quiet")
    assert (unpacked.exit_code, unpacked.stderr) == (0, "")
    before, after = tensors(folder / "dense"), tensors(folder / "again")
    assert set(before) == set(after)
    assert all(same(after[key], before[key] + 0.0) for key in before)


def test_pack_says_what_stays_dense_and_why(folder: Path) -> None:
    shown = " ".join(run("pack", folder / "dense").stdout.split())
    assert "outside the decoder layers" in shown
    report = json.loads(run("pack", folder / "dense", "--output", folder / "json", "--json").stdout)
    reasons = {row["matrix"]: row["reason"] for row in report["matrices"]}
    assert reasons["lm_head.weight"] == "outside the decoder layers"
    assert reasons["model.layers.0.mlp.up_proj.weight"] == ""
    assert report["ratio"] == 0.5625


def test_pack_refuses_what_was_not_pruned(tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "model")
    done = run("pack", tmp_path / "model", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["kind"] == "PatternError"
    assert "not pruned" in done.stderr
    assert not (tmp_path / "model-packed").exists()


def test_pack_does_not_overwrite_unasked(folder: Path) -> None:
    done = run("pack", folder / "dense", "--output", folder / "packed")
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
    assert run("pack", folder / "dense", "--output", folder / "packed", "--overwrite").exit_code == 0


def test_unpack_refuses_a_dense_checkpoint(folder: Path) -> None:
    done = run("unpack", folder / "dense", "--output", folder / "again")
    assert done.exit_code == 1
    assert "is not packed" in done.stderr


def test_inspect_shows_how_a_packed_matrix_is_stored(folder: Path) -> None:
    done = run("inspect", folder / "packed")
    assert done.exit_code == 0
    assert "as nm" in done.stdout
    assert "2:4" in done.stdout


def test_perplexity_of_a_packed_checkpoint_is_that_of_the_dense_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 90 + 4}" for number in range(400)))
    options = ["--text", tmp_path / "text.txt", "--length", "16", "--samples", "4", "--json"]
    one, other = (json.loads(run("perplexity", folder / name, *options).stdout) for name in ("dense", "packed"))
    assert one["perplexity"] == other["perplexity"]


def test_prune_takes_a_format(folder: Path, tmp_path: Path) -> None:
    options = ["--set", "calibration.samples=4", "--set", "calibration.length=16", "--set", "evaluation=null"]
    done = run(
        "prune", folder / "dense", "--recipe", "sparsegpt-2of4", "--format", "nm", "-o", tmp_path / "o", *options
    )
    assert done.exit_code == 0, done.stderr
    assert "quantization_config" in (tmp_path / "o" / "config.json").read_text()
    assert "format: nm" in (tmp_path / "o" / "recipe.yaml").read_text()
    refused = run("prune", folder / "dense", "--recipe", "sparsegpt-50", "--format", "nm", "-o", tmp_path / "p")
    assert refused.exit_code == 1
    assert "format is nm" in refused.stderr
