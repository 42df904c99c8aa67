"""transformers' OpenAI-compatible server, for one model loaded by `serving.loader.load`.

`transformers serve` provides the endpoints, streaming and the request queue. Its models come from its model manager;
ours provides one model, under one name.
"""

import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving import model_manager
from transformers.utils.import_utils import is_serve_available

from llmprune.errors import ModelError, ServingError
from llmprune.serving.loader import missing_template


def serve(
    load_model: Callable[[], PreTrainedModel],
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
    name: str,
    *,
    host: str = "localhost",
    port: int = 8000,
) -> None:
    """Serve a model over HTTP until Ctrl-C; requests are answered one after another.

    Args:
        load_model: called before the server starts, and again after a `POST /reset` has discarded the model.
        load_tokenizer: the same for its tokenizer.
        name: the model's name for clients.
        host: address to listen on.
        port: port to listen on.

    Raises:
        ServingError: a package that the server needs is not installed, or the port is taken.
        KeyboardInterrupt: by Ctrl-C, after the server has shut down.
    """
    require_server()
    # Checked before minutes of loading, not after.
    _require_free(host, port)
    from transformers.cli.serve import Serve

    class Manager(_OneModel):
        sources = load_model, load_tokenizer

    stock = model_manager.ModelManager
    model_manager.ModelManager = Manager
    try:
        Serve(force_model=name, host=host, port=port)
    finally:
        model_manager.ModelManager = stock


def require_server() -> None:
    """Refuse to continue without the packages of the extra `serve`.

    Raises:
        ServingError: one is missing.
    """
    if not is_serve_available():
        raise ServingError(
            "the packages that a server needs are not installed",
            expected="fastapi, uvicorn and openai",
            fix="pip install fastapi uvicorn openai, or install llmprune with its extra serve",
        )


class _OneModel(model_manager.ModelManager):  # type: ignore[misc] # transformers is not typed
    sources: tuple[Callable[[], PreTrainedModel], Callable[[], PreTrainedTokenizerBase]]

    def __init__(self, *args: Any, **named: Any) -> None:
        self._created = int(time.time())
        super().__init__(*args, **named)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as clients give it; transformers would parse a revision after an @, and add one."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *rest: Any, **named: Any) -> Any:
        """The model and its tokenizer, loaded if necessary."""
        if model_id_and_revision != self.force_model:
            raise ModelError(f"no model {model_id_and_revision!r} on this server", expected=repr(self.force_model))
        return super().load_model_and_processor(model_id_and_revision, *rest, **named)

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """What /v1/models lists."""
        return [{"id": self.force_model, "object": "model", "owned_by": "llmprune", "created": self._created}]

    def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
        return self.sources[0]()

    def _load_processor(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
        tokenizer = self.sources[1]()
        if tokenizer.chat_template is None:
            # The handlers would answer a chat request with "Internal Server Error".
            tokenizer.apply_chat_template = self._refuse_chat
        return tokenizer

    def _refuse_chat(self, *_: Any, **__: Any) -> NoReturn:
        from fastapi import HTTPException

        raise HTTPException(status_code=400, detail=str(missing_template(str(self.force_model))))


def _require_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            expected="an address of this machine, and a free port",
            fix="choose another --port, or stop the program that uses it",
        ) from error
