"""`llmprune archive` and `llmprune extract`."""

import json
import signal
import time
from pathlib import Path

import pytest
from command_line import run, spawn
from folders import contents
from packed_models import save_packed
from safetensors.torch import save_file
from torch import randn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_packed(tmp_path) / "dense"


def test_archive_and_extract_are_a_way_there_and_back(folder: Path) -> None:
    archived = run("archive", folder)
    assert archived.exit_code == 0, archived.stderr
    assert "model.safetensors" in archived.stdout
    assert "of the dense tensors" in archived.stdout
    assert "archiving: MB 1 of 1" in archived.stderr
    file = folder.with_name("dense.llmprune")
    extracted = run("extract", file, "--output", folder.with_name("again"), "--quiet")
    assert (extracted.exit_code, extracted.stderr) == (0, "")
    assert contents(folder.with_name("again")) == contents(folder)


def test_dry_runs_write_nothing_and_say_so(folder: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    planned = run("archive", folder, "--dry-run")
    assert "not written (dry run)" in planned.stdout
    assert contents(tmp_path) == before
    run("archive", folder)
    checked = run("extract", folder.with_name("dense.llmprune"), "-o", tmp_path / "again", "--dry-run")
    assert "the archive is sound" in checked.stdout
    assert not (tmp_path / "again").exists()


def test_as_json(folder: Path) -> None:
    archived = json.loads(run("archive", folder, "--json").stdout)
    assert archived["ratio"] == archived["coded_bytes"] / archived["bytes"] < 1
    assert {row["file"] for row in archived["files"]} == set(contents(folder))
    refused = run("archive", folder, "--json")
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["error"]["kind"] == "ResumeError"


def test_a_damaged_archive_is_an_error_of_the_user(folder: Path) -> None:
    run("archive", folder)
    file = folder.with_name("dense.llmprune")
    file.write_bytes(file.read_bytes()[:-9])
    done = run("extract", file, "-o", folder.with_name("again"))
    assert done.exit_code == 1
    assert "ends too early" in done.stderr
    assert not folder.with_name("again").exists()


@pytest.mark.slow
def test_an_interrupted_command_continues(folder: Path, tmp_path: Path) -> None:
    save_file({f"w{number}": randn(4 << 20) for number in range(12)}, folder / "model.safetensors")
    process = spawn("archive", folder)
    begun = tmp_path / ".dense.llmprune.partial" / "content"
    while process.poll() is None and not (begun.exists() and begun.stat().st_size > 8_000_000):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "interrupted; run the same command again to continue" in stderr
    assert not (tmp_path / "dense.llmprune").exists()
    kept = begun.stat().st_size
    assert run("archive", folder, "--quiet").exit_code == 0
    assert kept > 8_000_000
    assert run("extract", tmp_path / "dense.llmprune", "-o", tmp_path / "again", "--quiet").exit_code == 0
    assert contents(tmp_path / "again") == contents(folder)


def test_export(folder: Path) -> None:
    done = run("export", folder, "--to", "csr")
    assert done.exit_code == 0, done.stderr
    assert "14 of 14 as CSR" in done.stdout
    refused = run("export", folder, "--to", "csr", "--json")
    assert json.loads(refused.stdout)["error"]["kind"] == "ResumeError"
    again = json.loads(run("export", folder, "--to", "csr", "--overwrite", "--json").stdout)
    assert (again["to"], [row["file"] for row in again["files"]]) == ("csr", ["csr-model.safetensors"])
    assert run("export", folder, "--to", "other").exit_code == 2
