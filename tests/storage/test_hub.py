"""Names to folders: the bundled model, local folders, a hub imitated on this machine, and its cache; every refusal."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fake_hub import COMMIT, INDEX, FakeHub, write_checkpoint
from huggingface_hub import close_session, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import save_file

from llmprune.errors import CheckpointError, LlmpruneError, ModelError
from llmprune.storage.files import weight_files
from llmprune.storage.hub import checkpoint_digest, resolve_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version: ClassVar[str] = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = fake.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.endpoint = f"http://127.0.0.1:{server.server_port}"
    use_endpoint(monkeypatch, fake.endpoint)
    yield fake
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty hub cache, no proxies and no token of the person who runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    disable_progress_bars()
    close_session()  # a session keeps the settings that it was made under
    yield tmp_path / "cache"
    close_session()
    enable_progress_bars()


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    # The library reads HF_ENDPOINT once, on import.
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def write_cache(cache: Path, repository: str, **kwargs: object) -> Path:
    storage = cache / ("models--" + repository.replace("/", "--"))
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    return write_checkpoint(storage / "snapshots" / COMMIT, **kwargs)  # type: ignore[arg-type]


def refusal(kind: type[LlmpruneError], model: str | Path, revision: str | None = None) -> LlmpruneError:
    with pytest.raises(kind) as caught:
        resolve_model(model, revision=revision)
    assert caught.value.fix, "a refusal says what to do"
    return caught.value


def test_testbed_is_bundled_and_complete() -> None:
    folder = resolve_model("testbed")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("shards", [1, 3])
def test_local_folder(tmp_path: Path, shards: int) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=shards)
    assert resolve_model(str(folder)) == resolve_model(folder) == folder
    assert len(weight_files(folder)) == shards


def test_local_folder_goes_before_a_hub_id(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    assert not hub.requested


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(tmp_path / "m")
    assert resolve_model("~/m") == tmp_path / "m"


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", Path("testbed")])
def test_missing_folder(model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(ModelError, model)
    assert str(Path(model)) in error.what
    assert "hub id" in error.expected


def test_file_instead_of_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    assert "is a file" in refusal(ModelError, folder / "model.safetensors").what


def test_revision_of_a_local_folder(tmp_path: Path) -> None:
    assert "revision 'v1'" in refusal(ModelError, write_checkpoint(tmp_path / "m"), "v1").what


def test_folder_without_config(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path / "m") / "config.json").unlink()
    assert "has no config.json" in refusal(CheckpointError, tmp_path / "m").what


def test_adapter_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "merge_and_unload" in refusal(CheckpointError, folder).fix


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_config_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json" in refusal(CheckpointError, folder).what


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=0)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    error = refusal(CheckpointError, folder)
    assert "pytorch_model.bin" in error.what
    assert "save_pretrained" in error.fix


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=0)
    assert "has no weights" in refusal(CheckpointError, folder).what
    save_file({"a": torch.ones(1)}, folder / "consolidated.safetensors")
    assert "only consolidated.safetensors" in refusal(CheckpointError, folder).what


def test_quantised_model_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", config={"quantization_config": {"quant_method": "gptq"}})
    error = refusal(CheckpointError, folder)
    assert "gptq" in error.what
    assert "unquantised" in error.fix


def test_null_quantization_is_none(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", config={"quantization_config": None})
    assert resolve_model(folder) == folder


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    error = refusal(CheckpointError, folder)
    assert "1 of 3" in error.what
    assert "model-00002-of-00003.safetensors" in error.what


@pytest.mark.parametrize("weight_map", [None, {}, {"a": 1}, {"a": "../model.safetensors"}, {"a": "model.bin"}])
def test_index_that_means_nothing(tmp_path: Path, weight_map: object) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert INDEX in refusal(CheckpointError, folder).what


@pytest.mark.parametrize("shards", [1, 3])
def test_hub_model_is_downloaded_without_the_rest(hub: FakeHub, tmp_path: Path, shards: int) -> None:
    source = write_checkpoint(tmp_path / "repo", shards=shards)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "original/x.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"not wanted")
    for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja", "spiece.model", "LICENSE"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"wanted")
    hub.repositories["org/name"] = source

    folder = resolve_model("org/name")

    got = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    wanted = {"config.json", "tokenizer.json", "LICENSE", "spiece.model"}
    wanted |= {"chat_template.jinja", "additional_chat_templates/tool.jinja"}
    assert got == wanted | {p.name for p in weight_files(source)} | ({INDEX} if shards > 1 else set())
    assert checkpoint_digest(folder) == checkpoint_digest(source)
    # The branch is asked for once; the weights come from the commit that it named.
    assert hub.requested.count("api/models/org/name/revision/main") == 1


def test_hub_model_in_the_cache_needs_no_network(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/name"] = write_checkpoint(tmp_path / "repo")
    folder = resolve_model("org/name")
    hub.requested.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert resolve_model("org/name") == folder
    assert not hub.requested


def test_hub_quantised_model_is_refused_before_its_weights(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = write_checkpoint(tmp_path / "repo", config={"quantization_config": {"bits": 4}})
    refusal(CheckpointError, "org/name")
    assert not [path for path in hub.requested if path.endswith(".safetensors")]


def test_hub_pickles_are_refused_and_never_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = write_checkpoint(tmp_path / "repo", shards=0)
    (tmp_path / "repo" / "pytorch_model.bin").write_bytes(b"never opened")
    error = refusal(CheckpointError, "org/name")
    assert "hub model org/name" in error.what
    assert "pytorch_model.bin" in error.what
    assert not [path for path in hub.requested if path.endswith(".bin")]


def test_hub_repository_without_config(hub: FakeHub, tmp_path: Path) -> None:
    (write_checkpoint(tmp_path / "repo") / "config.json").unlink()
    hub.repositories["org/name"] = tmp_path / "repo"
    assert "hub model org/name has no config.json" in refusal(CheckpointError, "org/name").what


def test_hub_index_names_a_shard_that_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "repo", shards=2)
    (source / "model-00001-of-00002.safetensors").unlink()
    hub.repositories["org/name"] = source
    assert "model-00001-of-00002.safetensors" in refusal(CheckpointError, "org/name").what


def test_hub_model_not_found(hub: FakeHub) -> None:
    error = refusal(ModelError, "org/nothing")
    assert "no model org/nothing" in error.what
    assert "spelling" in error.fix


def test_hub_revision_not_found(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = write_checkpoint(tmp_path / "repo")
    assert "no revision 'v9'" in refusal(ModelError, "org/name", "v9").what


@pytest.mark.parametrize("status", [401, 403])
def test_hub_gated_model(hub: FakeHub, status: int) -> None:
    hub.statuses["org/name"] = (status, "GatedRepo")
    error = refusal(ModelError, "org/name")
    assert "gated" in error.what
    assert f"{hub.endpoint}/org/name" in error.fix


def test_hub_gated_files(hub: FakeHub, tmp_path: Path) -> None:
    """The hub itself lists a gated model's files to everybody, and refuses only the files."""
    hub.repositories["org/name"] = write_checkpoint(tmp_path / "repo")
    hub.gated_files = True
    assert "gated" in refusal(ModelError, "org/name").what


@pytest.mark.parametrize(("status", "fix"), [(403, "HF_TOKEN"), (500, "later")])
def test_hub_answers_another_error(hub: FakeHub, status: int, fix: str) -> None:
    hub.statuses["org/name"] = (status, "")
    error = refusal(ModelError, "org/name")
    assert f"answered {status}" in error.what
    assert fix in error.fix


def test_no_connection(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    error = refusal(ModelError, "org/name")
    assert "cannot be reached" in error.what
    assert "connection" in error.fix


def test_no_connection_but_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    folder = write_cache(cache, "org/name", shards=2)
    assert resolve_model("org/name") == folder


def test_complete_cache_asks_once(hub: FakeHub, cache: Path) -> None:
    hub.statuses["org/name"] = (500, "")
    folder = write_cache(cache, "org/name", shards=2)
    assert resolve_model("org/name") == folder
    assert len(hub.requested) == 1


def test_cache_that_cannot_be_written(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = write_checkpoint(tmp_path / "repo")
    (tmp_path / "cache").write_text("a file where the cache should be")
    assert "cannot be downloaded" in refusal(CheckpointError, "org/name").what


def test_offline_without_the_model(offline: Path) -> None:
    error = refusal(ModelError, "org/name")
    assert "HF_HUB_OFFLINE" in error.what
    assert "hf download org/name" in error.fix


def test_offline_with_the_model(offline: Path) -> None:
    folder = write_cache(offline, "org/name", shards=2)
    assert resolve_model("org/name") == folder
    assert resolve_model("org/name", revision=COMMIT) == folder


@pytest.mark.parametrize("cached", ["config.json", "tokenizer.json"])
def test_offline_with_only_part_of_it(offline: Path, cached: str) -> None:
    folder = write_cache(offline, "org/name", shards=0)
    for path in [path for path in folder.iterdir() if path.name != cached]:
        path.unlink()
    assert "HF_HUB_OFFLINE" in refusal(ModelError, "org/name").what


@pytest.mark.parametrize("model", ["a b", "org/", "--name"])
def test_neither_folder_nor_hub_id(cache: Path, model: str) -> None:
    assert "neither an existing folder nor a hub id" in refusal(ModelError, model).what
