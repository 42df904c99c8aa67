"""Resolve a model's name to a local folder with its files, and identify that folder by a digest.

A name is "testbed" (the bundled model), a local folder, or a hub id. Only what is needed is downloaded: the small
files first, so that a model that cannot be pruned is refused before its weights are fetched, then the safetensors files
that transformers would read. Pickles are never downloaded or opened: reading one can run code.
"""

import glob
import hashlib
import importlib.resources
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download

from llmprune.errors import CheckpointError, LlmpruneError, ModelError
from llmprune.paths import user_path
from llmprune.storage.files import (
    INDEX_NAME,
    SINGLE_NAME,
    header_bytes,
    listed,
    read_header,
    read_json,
    shard_names,
    weight_files,
    without_weights,
)
from llmprune.storage.packed_config import quantised_by

TESTBED = "testbed"

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")

_SAMPLE_BYTES = 1 << 20
_TENSOR_SAMPLE_BYTES = 1 << 12

# The transport's base error (httpx), taken from the hub client because it has changed its transport between versions.
_TransportError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """Find a model's files, downloading them if it is a hub id.

    Args:
        model: "testbed", a local folder, or a hub id such as "org/name". An existing folder takes precedence over a hub
            id of the same name, as in transformers; a `Path` is always local.
        revision: branch, tag or commit of a hub id; default: its main branch.

    Returns:
        A folder with config.json and every safetensors file of an unquantised checkpoint.

    Raises:
        ModelError: no such folder or hub id, no access to it, or no connection and not in the cache.
        CheckpointError: the folder has no config or weights, has only pickles, or is quantised.
    """
    if not isinstance(model, str | Path):
        raise ModelError(
            f"a model of type {type(model).__name__}",
            expected=f'"{TESTBED}", a local folder or a hub id',
            fix="pass one of these; only `prune` and `Stream` accept a transformers model in memory",
        )
    named = user_path(model, ModelError, expected=f'"{TESTBED}", a folder, or a hub id such as org/name')
    folder = _bundled() if model == TESTBED else named
    if not (isinstance(model, Path) or model == TESTBED or _looks_local(model)):
        return _from_hub(str(model), revision)
    if revision is not None:
        raise ModelError(
            f"revision {revision!r} for {model}, which is a local folder",
            expected="a revision only with a hub id",
            fix="remove the revision",
        )
    _check_folder(folder)
    _check_config(folder)
    weight_files(folder)
    return folder


def checkpoint_digest(folder: Path) -> str:
    """Identify a checkpoint without reading all of it: a few milliseconds per shard, whatever its size.

    sha256 over config.json and, for every shard sorted by name: its name, its size, its header, 1 MiB at the start, in
    the middle and at the end of its data, and 4 KiB in the middle of each tensor. The tensor samples detect changes to
    some matrices only, such as a merged adapter; an edit of a few weights outside all samples goes undetected. The
    tokenizer is not included.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: a file is missing, truncated or not a safetensors file.
    """
    _check_folder(folder)
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    for path in weight_files(folder):
        _add_shard(digest, path)
    return digest.hexdigest()


def shard_digest(path: Path) -> str:
    """Identify one safetensors file by the same samples.

    Raises:
        CheckpointError: it is missing, truncated or not a safetensors file.
    """
    digest = hashlib.sha256()
    _add_shard(digest, path)
    return digest.hexdigest()


def _add_shard(digest: "hashlib._Hash", path: Path) -> None:
    digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
    digest.update(header_bytes(path))
    with path.open("rb") as file:
        for start, end in _samples(path):
            file.seek(start)
            digest.update(file.read(end - start))


def _samples(path: Path) -> list[tuple[int, int]]:
    """The spans [start, end) of a safetensors file that represent its data, in a fixed order."""
    size, tensors = path.stat().st_size, sorted(stored.span for stored in read_header(path))
    first = tensors[0][0] if tensors else size
    whole = [_around(at, (first, size), _SAMPLE_BYTES) for at in (first, (first + size) // 2, size)]
    return whole + [_around((start + end) // 2, (start, end), _TENSOR_SAMPLE_BYTES) for start, end in tensors]


def _around(middle: int, span: tuple[int, int], length: int) -> tuple[int, int]:
    """At most `length` bytes around a position, inside the span."""
    start = max(span[0], min(middle - length // 2, span[1] - length))
    return start, min(start + length, span[1])


def _looks_local(model: str) -> bool:
    # A hub id has at most one slash; a name that starts like a path is meant as one even if nothing exists there.
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model or Path(model).exists()


def _bundled() -> Path:
    return Path(str(importlib.resources.files("llmprune.eval.testbed")))


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise ModelError(
            f"no folder {folder}",
            expected=f'"{TESTBED}", an existing folder or a hub id such as org/name',
            fix="check the spelling; relative paths start at the current folder",
        )
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file", expected="a folder", fix="give the folder that holds config.json")
    if not (folder / _CONFIG).is_file():
        adapter = (folder / _ADAPTER).is_file()
        raise CheckpointError(
            f"{folder} has no {_CONFIG}" + (", only an adapter's configuration" if adapter else ""),
            expected="a folder written by save_pretrained",
            fix="merge the adapter into its base model (merge_and_unload) and save the result"
            if adapter
            else "give the folder that transformers' from_pretrained loads",
        )


def _check_config(folder: Path) -> None:
    method = quantised_by(read_json(folder / _CONFIG).get("quantization_config"))
    if method is not None:
        raise CheckpointError(
            f"{folder / _CONFIG} says that the model is already quantised (quantization_config: {method})",
            expected="weights in float32, bfloat16 or float16",
            fix="prune the unquantised model, then quantise the result",
        )
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} has an adapter beside its weights ({_ADAPTER}), which would be ignored",
            expected="weights that are complete by themselves",
            fix="merge it first (merge_and_unload) and save the result, or move the adapter's files out of the folder",
        )


def _from_hub(repository: str, revision: str | None) -> Path:
    with _hub_errors(repository, revision):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(_SMALL_FILES)))
    # Later requests name the commit, so that a branch that moves in the meantime does not mix two versions.
    commit = folder.name
    if not (folder / _CONFIG).is_file():
        with _hub_errors(repository, revision):
            published = HfApi().list_repo_files(repository, revision=commit)
        raise CheckpointError(
            f"hub model {repository} has no {_CONFIG}, only {listed(published)}",
            expected="a repository that transformers' from_pretrained loads",
            fix="for an adapter or a GGUF file, give the model that it was derived from",
        )
    _check_config(folder)
    # Without an index among the small files, the weights can only be in a single file.
    names = shard_names(folder) if (folder / INDEX_NAME).is_file() else [SINGLE_NAME]
    # A complete model needs no further request, and no retries without a connection.
    if all((folder / name).is_file() for name in names):
        return folder
    with _hub_errors(repository, revision):
        snapshot_download(repository, revision=commit, allow_patterns=[glob.escape(name) for name in names])
        if names == [SINGLE_NAME] and not (folder / SINGLE_NAME).is_file():
            raise without_weights(f"hub model {repository}", HfApi().list_repo_files(repository, revision=commit))
    weight_files(folder)
    return folder


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, _TransportError, errors.HFValidationError) as error:
        raise _explain(error, repository, revision) from error


def _explain(error: Exception, repository: str, revision: str | None) -> LlmpruneError:
    """Translate an error of the hub's client, from the most specific to the most general."""
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, errors.HFValidationError):
        return ModelError(
            f"{repository!r} is neither an existing folder nor a hub id: {error}",
            expected=f'"{TESTBED}", a folder, or a hub id such as org/name',
            fix="check the spelling; relative paths start at the current folder",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"hub model {repository} has no revision {revision!r}", fix=f"choose one of {page}/tree/main")
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"hub model {repository} is gated, and this account has no access",
            fix=f"accept the conditions at {page}, then log in with `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"no model {repository}: there is no folder of this name, and no hub model that this account can see",
            fix="check the spelling; for a private model log in with `hf auth login` or set HF_TOKEN",
        )
    # The client reports an error status as "not in the cache", with the response in the cause.
    answer = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__
    if isinstance(answer, errors.HfHubHTTPError):
        return _refused(answer, repository)
    return _unreachable(error, repository)


def _refused(error: errors.HfHubHTTPError, repository: str) -> ModelError:
    status = error.response.status_code
    return ModelError(
        f"{constants.ENDPOINT} answered {status} for model {repository}: {error.server_message or error}",
        fix="log in with `hf auth login` or set HF_TOKEN to a token that may read the model"
        if status in (401, 403)
        else "try again later",
    )


def _unreachable(error: Exception, repository: str) -> LlmpruneError:
    cache = constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        return ModelError(
            f"no folder {repository}; as a hub model it is not complete in the cache {cache}, and "
            "HF_HUB_OFFLINE forbids downloading it",
            fix=f"unset HF_HUB_OFFLINE, or fetch it first with a network connection: hf download {repository}",
        )
    if isinstance(error, errors.LocalEntryNotFoundError | _TransportError):
        return ModelError(
            f"no folder {repository}; as a hub model it is not complete in the cache {cache}, and "
            f"{constants.ENDPOINT} cannot be reached",
            expected=f'"{TESTBED}", a folder, or a hub id such as org/name',
            fix="check the spelling of the folder, or the connection (HF_ENDPOINT and proxy variables too)",
        )
    return CheckpointError(
        f"model {repository} cannot be downloaded into {cache}: {error}",
        fix="check the space and the permissions there, or set HF_HOME to another folder",
    )
