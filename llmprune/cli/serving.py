"""The commands that use a checkpoint: `llmprune generate` and `llmprune serve`."""

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmprune.cli import console
from llmprune.cli.layout import DEPLOY, add
from llmprune.cli.options import AsJson, ComputeDtype, Device, DeviceMap, Dtype, Model, Quiet, explained, quieten
from llmprune.progress import Progress
from llmprune.units import quantity

if TYPE_CHECKING:
    from llmprune.serving.loader import Written

_GENERATE_EXAMPLES = """
Examples:

llmprune generate out/packed --prompt "Once upon a time"

llmprune generate out/packed --prompt - --max-new-tokens 500 --temperature 0 < prompt.txt
"""

_SERVE_EXAMPLES = """
Example:

llmprune serve out/packed --port 8000

curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon"}'
"""


class ServedAs(str, Enum):
    """How packed matrices are held in memory."""

    auto = "auto"
    packed = "packed"
    dense = "dense"
    cusparselt = "cusparselt"


Served = Annotated[
    ServedAs,
    typer.Option(
        metavar="FORM",
        help="How to hold packed matrices in memory: auto (fastest on this machine), packed (least memory), dense "
        "(ordinary weights) or cusparselt (a second copy for long prompts).",
    ),
]
Graphs = Annotated[bool, typer.Option("--graphs", help="Decode with CUDA graphs (GPU).")]
Template = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A Jinja chat template that replaces the model's own.")
]


def add_commands(app: typer.Typer) -> None:
    """Add both commands."""
    add(app, generate, DEPLOY, _GENERATE_EXAMPLES)
    add(app, serve, DEPLOY, _SERVE_EXAMPLES)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help='Text to continue; "-": from stdin.')],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens to generate, within the model's positions.")
    ] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="T", help="0 for greedy decoding. Default: the model's generation config."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed for sampling. Default: a new one each time.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat TEXT as a user message to a chat model. Implied by --chat-template.")
    ] = False,
    chat_template: Template = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = ComputeDtype.auto,
    served: Served = ServedAs.auto,
    graphs: Graphs = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate from a prompt, streaming to stdout; speed goes to stderr."""
    with explained(as_json):
        from llmprune.models.boundary import read_stock_config
        from llmprune.models.skeleton import quiet_transformers
        from llmprune.serving.loader import Sampling, encode, load, load_tokenizer, require_room, write
        from llmprune.storage.hub import resolve_model
        from llmprune.text.loading import model_positions

        quieten(quiet)
        tokenizer = load_tokenizer(model, chat_template)
        ids = encode(tokenizer, sys.stdin.read() if prompt == "-" else prompt, chat=chat or chat_template is not None)
        room = require_room(ids, model_positions(read_stock_config(resolve_model(model))))
        with console.Display(quiet=quiet) as display, quiet_transformers():
            display(Progress(f"loading {model}"))
            loaded = load(
                model,
                device=device or "auto",
                dtype=dtype.value,
                served=served.value,
                graphs=graphs,
                device_map=device_map,
            )
        sampling = Sampling(min(max_new_tokens, room or max_new_tokens), temperature, seed)
        written = write(loaded, tokenizer, ids, sampling, _ignore if as_json else _say)
        if as_json:
            console.show_json({"model": model, **written.to_dict()})
        else:
            _say("\n")
        if not quiet:
            console.tell(_speed(written))
        if written.finish == "interrupted":
            raise KeyboardInterrupt


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; 0.0.0.0 accepts other machines.")
    ] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT", help="Port to listen on.")] = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model name for clients. Default: MODEL as given.")
    ] = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = ComputeDtype.auto,
    served: Served = ServedAs.auto,
    graphs: Graphs = False,
) -> None:
    """Serve a model to OpenAI's clients, until Ctrl-C.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /health. Needs the extra `serve`.
    """
    with explained(False, lambda: "server stopped"):
        from llmprune.serving import server
        from llmprune.serving.loader import load, load_tokenizer
        from llmprune.text.loading import model_positions

        server.serve(
            lambda: load(model, device=device or "auto", dtype=dtype.value, served=served.value, graphs=graphs),
            lambda: load_tokenizer(model, chat_template),
            name or model,
            host=host,
            port=port,
            positions=model_positions,
        )


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(_: str) -> None:
    pass


def _speed(written: "Written") -> str:
    tokens = f"{quantity(written.tokens, 'token')} in {written.seconds:.2f} s"
    rate = written.tokens_per_second
    later = "" if rate is None else f", then {rate:.1f} tokens/s"
    return f"{tokens}: time to first token {written.first_token_seconds:.2f} s{later}"
