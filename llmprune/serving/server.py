"""An OpenAI-compatible server for one model loaded by `serving.loader.load`.

transformers provides the handlers of `transformers serve`, with streaming and a queue; around them are our own few
endpoints, which serve one model under one name. Requests pass `serving.gate` and `serving.fields` first.
"""

import asyncio
import atexit
import contextlib
import inspect
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality
from transformers.utils.import_utils import is_serve_available

from llmprune.errors import ServingError
from llmprune.serving.fields import Fields, check_chat, check_completion, read_fields
from llmprune.serving.gate import LEFT, Gate
from llmprune.serving.loader import Sampling, encode, missing_template, write

ENDPOINTS = {"/v1/chat/completions": "POST", "/v1/completions": "POST", "/v1/models": "GET", "/health": "GET"}

# No token of any tokenizer stands for more characters: longer prompts are refused without tokenizing them.
_CHARACTERS_PER_TOKEN = 256

# Any text will do.
_PROBE = "a"

# For models whose config sets no limit.
_POSITIONS = 1 << 17


def serve(
    load_model: Callable[[], PreTrainedModel],
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
    name: str,
    *,
    host: str = "localhost",
    port: int = 8000,
    positions: Callable[[PretrainedConfig], int | None] = lambda config: None,
) -> None:
    """Serve a model over HTTP until Ctrl-C; requests are answered one after another.

    Args:
        load_model: called before the server starts.
        load_tokenizer: the same for its tokenizer.
        name: the model's name for clients.
        host: address to listen on; a loopback address is only answered under a loopback name.
        port: port to listen on.
        positions: the most tokens, prompt and answer together, that a model can read; None: no limit.

    Raises:
        ServingError: a package that the server needs is not installed, or the port is taken.
        ModelError: the model cannot generate.
        KeyboardInterrupt: by Ctrl-C, after the server has shut down.
    """
    require_server()
    # Checked before minutes of loading, not after.
    _require_free(host, port)
    import uvicorn

    tokenizer, model = load_tokenizer(), load_model()
    # One token, by the settings that requests will meet: what is wrong with them is said now, not to every client.
    write(model, tokenizer, encode(tokenizer, _PROBE, chat=False), Sampling(max_new_tokens=1))
    state = _State(positions(model.config) or _POSITIONS)
    gate = Gate(build_app(model, tokenizer, name, state), ENDPOINTS, host)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            gate.close()
            await super().shutdown(sockets)

    # Seconds until requests are cancelled that do not end by themselves.
    config = uvicorn.Config(gate, host=host, port=port, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    try:
        Server(config).run()
    finally:
        if not state.manager.idle.wait(1.0):
            # A forward pass still running in its thread would abort the interpreter on its way out.
            atexit.register(os._exit, 130)


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


def build_app(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, state: "_State") -> Any:
    """The endpoints, as a FastAPI application; a `Gate` belongs in front of it.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        name: the model's name for clients.
        state: what runs `generate`.
    """
    from fastapi import FastAPI, HTTPException, Request
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler

    reserved = _template_arguments(tokenizer)
    _guard_template(tokenizer, name)
    manager = _OneModel(model, tokenizer, name)
    chat, text = (kind(manager, state) for kind in (ChatCompletionHandler, CompletionHandler))
    limit = state.positions * _CHARACTERS_PER_TOKEN
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())

    async def answer(handler: Any, check: Callable[[Fields], Fields], request: Request) -> Any:
        try:
            fields = check(read_fields(await request.body()))
            for token in fields.get("logit_bias", ()):
                if int(token) >= model.config.get_text_config(decoder=True).vocab_size:
                    raise ServingError(f"logit_bias.{token} is beyond the vocabulary")
        except ServingError as error:
            raise HTTPException(400, str(error)) from error
        # Each handler refuses the other's field, whatever it holds.
        prompt = fields["prompt"] if handler is text else json.dumps(fields["messages"], ensure_ascii=False)
        if len(prompt) > limit:
            raise HTTPException(400, f"a prompt of more than {limit:,} characters, for {state.positions:,} positions")
        return await handler.handle_request(fields, str(uuid.uuid4()))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        return await answer(chat, lambda fields: check_chat(fields, reserved), request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await answer(text, check_completion, request)

    @app.get("/v1/models")
    async def models() -> Any:
        listed = {"id": name, "object": "model", "owned_by": "llmprune", "created": created}
        return {"object": "list", "data": [listed]}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    return app


class _OneModel:
    """What transformers' handlers ask for a model: always the same one."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._both, self.force_model = (model, tokenizer), name

    def process_model_name(self, _: str) -> str:
        """The name as clients give it; transformers would parse a revision and a file in it."""
        return self.force_model

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer."""
        return self._both

    def get_model_modality(self, *_: Any, **__: Any) -> Modality:
        """Text only."""
        return Modality.LLM


class _State(GenerationState):  # type: ignore[misc] # transformers is not typed
    """One queue, since there is one model."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions, self.manager = positions, _Generation(positions)

    def get_manager(self, *_: Any, **__: Any) -> "_Generation":
        """What runs `generate` for a request."""
        return self.manager


class _Generation(GenerateManager):  # type: ignore[misc]
    """Runs `generate` within the model's positions, and only as long as somebody waits for it.

    Attributes:
        idle: set while nothing is generated.
    """

    def __init__(self, positions: int) -> None:
        super().__init__()
        self._positions = positions
        self.idle = threading.Event()
        self.idle.set()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **named: Any
    ) -> Any:
        """As transformers does it."""
        fitted = self._fitted(model, inputs, gen_config)
        return super().generate_streaming(model, processor, fitted, gen_config, *rest, **named)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **named: Any
    ) -> Any:
        """As transformers does it."""
        fitted = self._fitted(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, fitted, gen_config, *rest, **named)

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Queue a function, to be called if somebody still waits for it then."""
        return super().submit(self._watched(fn), *args, **kwargs)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same, with a future of asyncio, which may be cancelled in the meantime."""
        loop = asyncio.get_running_loop()
        future, run = loop.create_future(), self._watched(fn)

        def settle(done: Callable[[Any], None], outcome: Any) -> None:
            if not future.done():
                done(outcome)

        def report() -> None:
            try:
                outcome: tuple[Any, Any] = future.set_result, run(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 # raised where the future is awaited
                outcome = future.set_exception, error
            # The loop may have ended with the server.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, *outcome)

        super().submit(report)
        return future

    def _watched(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        left = LEFT.get()

        def run(*args: Any, **kwargs: Any) -> Any:
            if left.is_set():
                raise RuntimeError("the client has left")
            self.idle.clear()
            try:
                return fn(*args, **kwargs)
            finally:
                self.idle.set()

        return run

    def _fitted(self, model: Any, inputs: Any, gen_config: Any) -> dict[str, Any]:
        """The inputs, and what ends generation; the configuration is limited in place."""
        from fastapi import HTTPException

        length = inputs["input_ids"].shape[-1]
        if not 0 < length < self._positions:
            expected = f"1 to {self._positions - 1:,}, so that one of {self._positions:,} positions is left"
            raise HTTPException(400, f"a prompt of {length:,} tokens\nexpected: {expected}")
        if (largest := int(inputs["input_ids"].max())) >= (known := model.get_input_embeddings().weight.shape[0]):
            raise HTTPException(
                400, f"the prompt has token {largest}\nexpected: one of the model's {known:,} embeddings"
            )
        most = self._positions - length
        gen_config.max_new_tokens = min(gen_config.max_new_tokens or most, most)
        return {**inputs, "stopping_criteria": StoppingCriteriaList([_Left(LEFT.get())])}


class _Left(StoppingCriteria):  # type: ignore[misc]
    """Ends generation once nobody waits for it."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.new_full((len(input_ids),), self._left.is_set()).bool()


def _template_arguments(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """What the function that applies a chat template takes besides the template's own values."""
    # The last two are the handler's own.
    return frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) | {
        "load_audio_from_video",
        "num_frames",
    }


def _guard_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Turn what a chat template refuses into answers; the handlers would fail."""
    from fastapi import HTTPException

    apply = tokenizer.apply_chat_template

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if tokenizer.chat_template is None:
            raise HTTPException(400, str(missing_template(name)))
        try:
            return apply(*args, **kwargs)
        except Exception as error:  # a template is a program of the checkpoint's, and may raise anything
            raise HTTPException(400, f"the chat template of {name} refuses these messages: {error}") from error

    tokenizer.apply_chat_template = guarded


def _require_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            expected="an address of this machine, and a free port",
            fix="choose another --port, or stop the program that uses it",
        ) from error
