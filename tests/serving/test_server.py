"""`llmprune serve`, asked by the client that people use: one server for the dense testbed, one for the packed."""

import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import run, spawn
from packed_models import prune_by_magnitude
from tiny_models import build, save
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from llmprune.errors import ServingError
from llmprune.patterns import parse
from llmprune.pruning.packing import pack
from llmprune.serving import server

TESTBED = Path(__file__).parents[2] / "eval" / "testbed"
PROMPT = "The library"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"

pytestmark = pytest.mark.slow
needs_server = pytest.mark.skipif(not is_serve_available(), reason="the extra llmprune[serve] is not installed")


@dataclass
class Server:
    """A running server."""

    process: "subprocess.Popen[str]"
    folder: Path
    name: str
    port: int

    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"http://localhost:{self.port}/v1", api_key="none", max_retries=0, timeout=60)


def start(folder: Path, name: str | None = None) -> Server:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", port, "--device", "cpu", "--dtype", "float32", *(["--name", name] if name else [])]
    process = spawn("serve", folder, *options, stderr=subprocess.STDOUT)
    return Server(process, folder, name or str(folder), port)


def wait(running: Server) -> None:
    for _ in range(600):
        assert running.process.poll() is None, running.process.communicate()[0]
        with socket.socket() as attempt:
            if attempt.connect_ex(("localhost", running.port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no server at port {running.port}")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """The pruned testbed with a chat template, and its packed form, without one, under another name."""
    dense = tmp_path_factory.mktemp("served") / "dense@home"
    shutil.copytree(TESTBED, dense, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    prune_by_magnitude(dense, parse("2:4"))
    packed = dense.parent / "packed"
    pack(dense, packed)
    (dense / "chat_template.jinja").write_text(TEMPLATE)
    running = {"dense": start(dense), "packed": start(packed, "org/pruned")}
    try:
        for each in running.values():
            wait(each)
        yield running
    finally:
        for each in running.values():
            each.process.kill()
            each.process.communicate()


def expected(folder: Path, prompt: str, tokens: int) -> str:
    """What a stock model writes, with the likeliest token each time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    written = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


@needs_server
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_completes_a_text(servers: dict[str, Server], kind: str) -> None:
    running = servers[kind]
    with running.client() as client:
        answer = client.completions.create(model=running.name, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.model == running.name
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == expected(servers["dense"].folder, PROMPT, 12) != ""


@needs_server
def test_streams_a_chat(servers: dict[str, Server]) -> None:
    running = servers["dense"]
    messages = [{"role": "user", "content": "Where is it?"}]
    with running.client() as client:
        stream = client.chat.completions.create(
            model=running.name, messages=messages, max_tokens=8, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(piece or "" for piece in pieces) == expected(running.folder, "user: Where is it?\n", 8)


@needs_server
def test_streams_a_completion_of_packed_weights(servers: dict[str, Server]) -> None:
    running = servers["packed"]
    with running.client() as client:
        stream = client.completions.create(model=running.name, prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == expected(servers["dense"].folder, PROMPT, 8)


@needs_server
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_lists_the_one_model(servers: dict[str, Server], kind: str) -> None:
    with servers[kind].client() as client:
        assert [model.id for model in client.models.list()] == [servers[kind].name]


@needs_server
def test_refuses_another_model_and_a_chat_without_template(servers: dict[str, Server]) -> None:
    from openai import BadRequestError

    running = servers["packed"]
    with running.client() as client:
        with pytest.raises(BadRequestError) as other:
            client.completions.create(model="org/other", prompt=PROMPT)
        with pytest.raises(BadRequestError) as chat:
            client.chat.completions.create(model=running.name, messages=[{"role": "user", "content": "Hello"}])
    assert "pinned to 'org/pruned'" in other.value.response.json()["detail"]
    assert "org/pruned has no chat template" in chat.value.response.json()["detail"]


@needs_server
def test_ctrl_c_shuts_down(servers: dict[str, Server]) -> None:
    """The last test of these servers."""
    for running in servers.values():
        running.process.send_signal(signal.SIGINT)
    for running in servers.values():
        output, _ = running.process.communicate(timeout=30)
        assert running.process.returncode == 130, output
        assert output.splitlines()[-1] == "server stopped"
        assert "Traceback" not in output


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[Server]:
    """A server whose answers take hours: a tiny model with room for a million tokens, and no end of text."""
    folder = save(build("llama", max_position_embeddings=1 << 20), tmp_path / "endless")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "eos_token_id": None}))
    running = start(folder)
    try:
        wait(running)
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def send(running: Server, fields: Any, missing: int = 0) -> socket.socket:
    """Ask for a completion, without the last bytes of the request."""
    body = json.dumps({"prompt": "w50", "max_tokens": 10**9, **fields}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("localhost", running.port), timeout=10)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) - missing])
    return connection


@needs_server
@pytest.mark.parametrize(
    ("state", "sent"),
    [
        ("asked", signal.SIGTERM),
        ("streaming", signal.SIGTERM),
        ("generating", signal.SIGINT),
    ],
)
def test_a_signal_ends_the_server_whatever_it_does(endless: Server, state: str, sent: signal.Signals) -> None:
    with contextlib.ExitStack() as open_connections:
        if state == "asked":
            open_connections.enter_context(send(endless, {}, missing=5))
        else:
            # The second request waits for the first.
            for _ in range(2):
                open_connections.enter_context(send(endless, {"stream": state == "streaming"}))
        time.sleep(1.5)
        endless.process.send_signal(sent)
        # After Ctrl-C the interpreter takes its libraries apart, which takes seconds of its own.
        output, _ = endless.process.communicate(timeout=15)
    assert endless.process.returncode == (130 if sent is signal.SIGINT else -signal.SIGTERM), output
    assert "Traceback" not in output
    assert ("[Request received]" in output) == (state != "asked")


@needs_server
def test_clients_that_leave_and_those_that_are_not_answered(endless: Server) -> None:
    for stream in (False, True):
        with send(endless, {"stream": stream}):
            time.sleep(1)
        started = time.perf_counter()
        with endless.client() as client:
            client.completions.create(model=endless.name, prompt="w50", max_tokens=1)
        assert time.perf_counter() - started < 20

    def status(method: str, path: str, body: str = "", **headers: str) -> int:
        connection = http.client.HTTPConnection("localhost", endless.port, timeout=30)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        found = connection.getresponse().status
        connection.close()
        return found

    assert status("GET", "/health") == 200
    assert status("GET", "/health", Host="evil.example") == 400
    assert status("POST", "/reset") == status("POST", "/load_model") == 404
    assert status("POST", "/v1/completions", '{"prompt": "x"}', Content_Type="text/plain") == 415
    large = json.dumps({"prompt": "x" * (9 << 20)})
    assert status("POST", "/v1/completions", large, Content_Type="application/json") == 413


@needs_server
def test_a_taken_port_is_refused_before_anything_is_loaded() -> None:
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServingError, match=f"cannot listen on localhost, port {port}"):
            server.serve(unreachable, unreachable, "testbed", port=port)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "is_serve_available", lambda: False)
    result = run("serve", "testbed")
    assert result.exit_code == 1
    assert "pip install fastapi uvicorn openai" in result.stderr


def unreachable() -> Any:
    raise AssertionError("nothing must be loaded")
