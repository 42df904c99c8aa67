"""`llmprune report` and `llmprune compare`."""

import json
import webbrowser
from pathlib import Path

import pytest
from command_line import make_plain, run
from synthetic_runs import report, write_run


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that a browser was asked to show."""
    addresses: list[str] = []

    def open_(address: str) -> bool:
        addresses.append(address)
        return len(addresses) < 2

    monkeypatch.setattr(webbrowser, "open", open_)
    return addresses


def test_a_report_is_written_and_opened_if_asked(tmp_path: Path, opened: list[str]) -> None:
    folder = write_run(tmp_path / "a b")
    # Not on a terminal.
    result = run("report", folder)
    assert (result.exit_code, opened) == (0, [])
    assert "report.html" in "".join(result.stdout.split())
    assert (folder / "report.html").is_file()
    assert run("report", folder, "--no-open").exit_code == 0
    assert opened == []
    assert run("report", folder, "--open").stderr == ""
    assert opened == [(folder / "report.html").as_uri()]
    assert "no browser found" in run("report", folder, "--open").stderr


def test_a_folder_without_a_report_is_explained(tmp_path: Path, opened: list[str]) -> None:
    result = run("report", tmp_path, "--open")
    assert result.exit_code == 1
    assert "report.json" in result.stderr or "there is no folder" in result.stderr
    assert opened == []


def test_runs_are_compared_in_tables_of_80_columns(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("first-run", "a-run-with-a-rather-long-name")]
    other = write_run(tmp_path / "other", report(digest="b" * 64))
    result = run("compare", *folders, other)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    row = next(line for line in lines if "first-run" in line)
    assert row.split()[:3] == ["first-run", "sparsegpt", "50.0%"]  # the pattern is on the next line
    assert [line.split()[:2] for line in lines if "dense" in line] == [["model", "dense"]] * 2
    assert "25.00" in row
    assert "0.1250" in row
    assert result.stdout.count("perplexity ") == 2
    assert "not comparable" in " ".join(result.stdout.split())


def test_a_comparison_as_json_and_as_a_page(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in "ab"]
    page = tmp_path / "pages" / "compare.html"
    result = run("compare", *folders, "--json", "--html", page)
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["model", "a", "b"]
    assert str(page) in "".join(result.stderr.split("\n"))
    assert "Comparison of 2 runs" in page.read_text()


def test_mistakes_are_explained(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    result = run("compare", folder, "--against", "./missing", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "ModelError"
    assert run("compare").exit_code == 2
