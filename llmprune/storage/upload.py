"""Upload a finished checkpoint to the Hugging Face hub, after what can be checked has been checked early."""

import glob
import shlex
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # public, but not in __all__

from llmprune.errors import UploadError
from llmprune.storage.exchange import earlier_files

# The hub's client waits without a limit for an answer; a machine behind a firewall may never get one.
_SECONDS = 60.0

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def require_upload(repository: str) -> None:
    """Check that an upload can begin: to be called before the work whose result is uploaded.

    Args:
        repository: ORG/NAME; it need not exist yet.

    Raises:
        UploadError: the name is not valid, there is no token, or the hub does not accept it for writing.
    """
    _check_name(repository)
    if constants.HF_HUB_OFFLINE:
        raise UploadError(
            f"an upload to {repository} while HF_HUB_OFFLINE is set", fix="unset it, or upload the result later"
        )
    token = get_token()
    if token is None:
        raise UploadError(f"an upload to {repository} without a token of the hub", fix=_LOGIN)
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise UploadError(
            f"an upload to {repository} with a token that holds other characters than a token can",
            expected="letters, digits and _ only",
            fix=_LOGIN,
        )
    try:
        account = _account()
    except Exception as error:  # the client's own, its transport's and the system's
        refused = isinstance(error, errors.HfHubHTTPError)
        fix = _LOGIN if refused else "check the connection, or upload the result later with `hf upload`"
        raise _failed(f"an upload to {repository}", error, fix) from error
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UploadError(
            f"an upload to {repository} with a token that may only read", expected="a token that may write", fix=_LOGIN
        )


def upload(folder: Path, repository: str) -> str:
    """Upload the files of a result to a model repository, which is created if it does not exist.

    Args:
        folder: with the finished checkpoint.
        repository: ORG/NAME.

    Returns:
        The address of the repository.

    Raises:
        UploadError: the hub refused or could not be reached; the folder is as it was.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a model pruned by llmprune",
            # Nothing else that lies there, such as notes and adapters of the user's own.
            allow_patterns=[glob.escape(name) for name in sorted(earlier_files(folder))],
        )
    except Exception as error:  # the client's own, its transport's and the system's
        later = f"the result is complete; upload it later with: {upload_command(folder, repository)}"
        raise _failed(f"{folder} could not be uploaded to {repository}", error, later) from error
    return f"{constants.ENDPOINT}/{repository}"


def upload_command(folder: Path, repository: str = "ORG/NAME") -> str:
    """The command that uploads a folder."""
    return shlex.join(["hf", "upload", repository, str(folder)])


def _account() -> dict[str, Any]:
    """What the hub knows about the token, or `TimeoutError`."""
    answers: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(HfApi().whoami())
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            failures.append(error)

    # A daemon, so that a question without an answer does not keep the process from ending.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS)
    if failures:
        raise failures[0]
    if not answers:
        raise TimeoutError(f"no answer in {_SECONDS:.0f} seconds")
    return answers[0]


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except errors.HFValidationError:
        valid = False
    if not valid:
        raise UploadError(
            f"an upload to {repository!r}",
            expected="ORG/NAME: an organisation or a user of the hub, and a name of letters, digits, '-', '_' and '.'",
            fix="for example --push-to-hub my-name/my-model",
        )


def _failed(what: str, error: Exception, fix: str) -> UploadError:
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return UploadError(f"{what}: {constants.ENDPOINT} answered {status}: {error.server_message or error}", fix=fix)
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, (OSError, errors.HTTPError)):  # type: ignore[attr-defined] # its transport's
        return UploadError(f"{what}: {constants.ENDPOINT} cannot be reached: {lines[0]}", fix=fix)
    return UploadError(f"{what}: {type(error).__name__}: {lines[0]}", fix=fix)
