"""`--push-to-hub`: checked first, done last, and what is said without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import SMALL, make_plain, run
from huggingface_hub import HfApi, constants


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, hidden size 32."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches the hub."""
    calls: list[Any] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("llmprune.storage.upload.get_token", lambda: "hf_x")
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append(name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options["folder_path"]))
    return calls


def test_prune_and_pack_upload_their_results(model: Path, tmp_path: Path, sent: list[Any]) -> None:
    pruned = ["prune", model, "--recipe", "demo", "--pattern", "2:4", "--output", tmp_path / "out", *SMALL]
    result = run(*pruned, "--push-to-hub", "me/sparse")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == f"uploaded to {constants.ENDPOINT}/me/sparse"
    assert "hf upload" not in result.stdout + result.stderr
    result = run("pack", tmp_path / "out", "--push-to-hub", "me/packed", "--json")
    assert json.loads(result.stdout)
    assert sent == ["me/sparse", tmp_path / "out", "me/packed", tmp_path / "out-packed"]


def test_without_it_the_command_is_shown_once(model: Path, tmp_path: Path) -> None:
    arguments = ["prune", model, "--recipe", "demo", "--output", tmp_path / "o u t", *SMALL]
    shown = run(*arguments).stderr
    assert shown.count("hf upload") == 1
    assert shown.splitlines()[-1] == f"to upload it: hf upload ORG/NAME '{tmp_path / 'o u t'}'"
    for less in ("--json", "--quiet"):
        assert "hf upload" not in run(*arguments, "--resume", less).stderr


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_bad_name_is_refused_before_anything_begins(
    model: Path, tmp_path: Path, sent: list[Any], dry: list[str]
) -> None:
    arguments = ["prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL]
    result = run(*arguments, "--push-to-hub", "my model", *dry, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "UploadError"
    assert not (tmp_path / "out").exists()
    assert sent == []


@pytest.mark.parametrize("error", [ConnectionError("gone"), KeyboardInterrupt()])
def test_a_failed_upload_keeps_the_result(
    error: BaseException, model: Path, tmp_path: Path, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: HfApi, **options: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    arguments = ["prune", model, "--recipe", "demo", "--output", tmp_path / "out", *SMALL]
    result = run(*arguments, "--push-to-hub", "me/sparse")
    assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert f"hf upload me/sparse {tmp_path / 'out'}" in result.stderr.replace("\n", " ")
    assert "perplexity" in result.stdout
    assert (tmp_path / "out" / "report.json").is_file()
