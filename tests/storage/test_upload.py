"""Uploads: what is checked first, what is sent, and what an error leaves behind."""

import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import filter_repo_objects

from llmprune.errors import UploadError
from llmprune.storage.upload import require_upload, upload, upload_command


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that knows its user, who may write."""
    found: dict[str, Any] = {"name": "me", "auth": {"accessToken": {"role": "write"}}}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("llmprune.storage.upload.get_token", lambda: "hf_x")
    monkeypatch.setattr(HfApi, "whoami", lambda self: found)
    return found


def test_a_valid_name_and_a_token_that_writes_are_enough() -> None:
    require_upload("me/my-model_1.0")


@pytest.mark.parametrize("name", ["", "model", "a/b/c", "me/my model", "https://huggingface.co/a/b", "me/", "me/a--b"])
def test_names(name: str) -> None:
    with pytest.raises(UploadError, match="an upload to") as caught:
        require_upload(name)
    assert "ORG/NAME" in caught.value.expected


def test_what_stands_against_an_upload(account: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    account["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(UploadError, match="may only read"):
        require_upload("me/model")

    def unreachable(self: HfApi) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(HfApi, "whoami", unreachable)
    with pytest.raises(UploadError, match=r"cannot be reached: no route\n"):
        require_upload("me/model")
    monkeypatch.setattr("llmprune.storage.upload.get_token", lambda: None)
    with pytest.raises(UploadError, match="without a token") as caught:
        require_upload("me/model")
    assert "hf auth login" in caught.value.fix
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE"):
        require_upload("me/model")


@pytest.mark.parametrize("token", ["hf_SECRET\x01", "hf_SECR\u00e9T", "hf_SEC RET"])
def test_a_malformed_token_is_not_repeated(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.storage.upload.get_token", lambda: token)
    with pytest.raises(UploadError, match="a token that holds other characters") as caught:
        require_upload("me/model")
    assert "SEC" not in str(caught.value)


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(HfApi, "whoami", lambda self: released.wait(30))
    monkeypatch.setattr("llmprune.storage.upload._SECONDS", 0.01)
    with pytest.raises(UploadError, match="cannot be reached: no answer in 0 seconds"):
        require_upload("me/model")
    released.set()


def test_an_upload_sends_the_files_of_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", ".llmprune.json", "vocab[1].json", "secret_notes.md"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".llmprune.json").write_text('{"files": ["vocab[1].json"]}')
    sent: list[tuple[str, Any]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: sent.append((name, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: sent.append((options["repo_id"], options)))
    assert upload(tmp_path, "me/model").endswith("/me/model")
    assert sent[0] == ("me/model", {"exist_ok": True})
    assert (sent[1][0], sent[1][1]["folder_path"]) == ("me/model", tmp_path)
    names = [file.name for file in tmp_path.iterdir()]
    chosen = set(filter_repo_objects(names, allow_patterns=sent[1][1]["allow_patterns"]))
    assert chosen == {"config.json", ".llmprune.json", "vocab[1].json"}


@pytest.mark.parametrize("error", [ConnectionError("gone"), RuntimeError("lfs"), ValueError("odd")])
def test_a_failure_names_the_command_for_later(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: HfApi, name: str, **options: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    folder = tmp_path / "out put"
    with pytest.raises(UploadError, match=str(error)) as caught:
        upload(folder, "me/model")
    assert caught.value.fix.endswith(f"hf upload me/model '{folder}'")
    assert upload_command(folder) == f"hf upload ORG/NAME '{folder}'"
