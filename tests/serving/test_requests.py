"""Requests to a served tiny model: limits, refusals, and clients that leave. Within this process, without a network."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import Client, ask
from tiny_models import build, save
from transformers.utils.import_utils import is_serve_available

from llmprune.errors import ModelError
from llmprune.serving.gate import Gate
from llmprune.serving.loader import load, load_tokenizer
from llmprune.serving.server import ENDPOINTS, _State, build_app, serve

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="the extra llmprune[serve] is not installed")

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ message.content }} {% endfor %}"
)
TESTBED = Path(__file__).parents[2] / "eval" / "testbed"
POSITIONS = 64
WORD = "w50"
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": WORD}]


class Served:
    """A tiny model behind its gate."""

    def __init__(self, folder: Any, positions: int, template: str | None = TEMPLATE) -> None:
        model, tokenizer = load(folder, device="cpu"), load_tokenizer(folder)
        tokenizer.chat_template = template
        model.generation_config.eos_token_id = None  # goes on until something stops it
        self.state = _State(positions)
        self.gate = Gate(build_app(model, tokenizer, "tiny", self.state), ENDPOINTS, "localhost")

    def ask(self, path: str, **fields: Any) -> Client:
        return ask(self.gate, path, fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save(build("llama"), tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture
def served(folder: Any) -> Iterator[Served]:
    made = Served(folder, POSITIONS)
    yield made
    assert made.state.manager.idle.wait(5)


@pytest.mark.parametrize(("path", "prompt"), [(TEXT, {"prompt": WORD}), (CHAT, {"messages": HELLO})])
@pytest.mark.parametrize("most", [{"max_tokens": 10**9}, {}, {"max_tokens": 10**40}])
def test_an_answer_ends_where_the_positions_do(served: Served, path: str, prompt: Any, most: Any) -> None:
    answer = served.ask(path, **prompt, **most, temperature=0)
    assert answer.status == 200, answer.text
    content = json.loads(answer.text)
    assert content["usage"]["total_tokens"] == POSITIONS
    assert content["choices"][0]["finish_reason"] == "length"
    streamed = served.ask(path, **prompt, **most, temperature=0, stream=True)
    assert streamed.status == 200
    last = json.loads(streamed.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["usage"]["total_tokens"] == POSITIONS
    assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_beyond_the_positions_are_refused(served: Served, stream: bool) -> None:
    assert served.ask(TEXT, prompt=" ".join([WORD] * (POSITIONS - 1)), stream=stream).status == 200
    for words in (POSITIONS, 2 * POSITIONS, 10_000):
        answer = served.ask(TEXT, prompt=" ".join([WORD] * words), stream=stream)
        assert answer.status == 400
        assert "64 positions" in answer.detail
        messages = [{"role": "user", "content": " ".join([WORD] * words)}]
        assert served.ask(CHAT, messages=messages, stream=stream).status == 400
    empty = served.ask(TEXT, prompt="", stream=stream)
    assert empty.status == 400
    assert "0 tokens" in empty.detail


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"50": -100}}, {"logit_bias": {}}, {"seed": 0},
        {"frequency_penalty": -0.9}, {"frequency_penalty": 2}, {"temperature": 1e-30}, {"temperature": 2},
        {"temperature": 1e-3}, {"top_p": 1e-6}, {"seed": 2**63 - 1}, {"n": 5, "user": "me", "max_tokens": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize(("path", "prompt"), [(TEXT, {"prompt": WORD}), (CHAT, {"messages": HELLO})])
def test_what_fields_allow_is_answered(served: Served, path: str, prompt: Any, fields: Any) -> None:
    answer = served.ask(path, **prompt, **{"max_tokens": 4, **fields})
    assert answer.status == 200, answer.text


def test_stop_strings_of_any_kind_are_answered() -> None:
    """With a tokenizer of the usual kind: transformers cannot look for strings among whole words."""
    served = Served(TESTBED, POSITIONS)
    whole = json.loads(served.ask(TEXT, prompt="The library", max_tokens=8, temperature=0).text)["choices"][0]["text"]
    stop = whole[3:5]
    answer = served.ask(TEXT, prompt="The library", max_tokens=8, temperature=0, stop=[stop, "\u2603 never"])
    (choice,) = json.loads(answer.text)["choices"]
    assert whole.startswith(choice["text"])
    assert len(choice["text"]) < len(whole)
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"load_audio_from_video": True}}, "load_audio_from_video"),
        ({"chat_template_kwargs": {"tokenizer_kwargs": "x"}}, "tokenizer_kwargs"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no system role"),
        ({"messages": 5}, "messages"),
        ({"generation_config": "{}"}, "generation_config"),
        ({"logit_bias": {"128": 1}}, "beyond the vocabulary"),
        ({"model": "other"}, "pinned to 'tiny'"),
    ],
)
def test_what_only_the_operator_may_choose_is_refused(served: Served, fields: Any, reason: str) -> None:
    answer = served.ask(CHAT, **{"messages": HELLO, **fields})
    assert answer.status == 400
    assert reason in answer.detail


def test_harmless_values_reach_the_template(folder: Any) -> None:
    served = Served(folder, POSITIONS, "{% if shout %}w60{% else %}w61{% endif %}")
    loud, quiet = (
        json.loads(served.ask(CHAT, messages=HELLO, temperature=0, max_tokens=8, **more).text)["choices"]
        for more in ({"chat_template_kwargs": {"shout": True}}, {})
    )
    assert loud != quiet


def test_unknown_fields_and_models_without_a_template_are_refused(folder: Any) -> None:
    served = Served(folder, POSITIONS, None)
    assert served.ask(TEXT, prompt=WORD, extra=1).status == 422
    answer = served.ask(CHAT, messages=HELLO)
    assert answer.status == 400
    assert "tiny has no chat template" in answer.detail


def test_the_model_is_listed(served: Served) -> None:
    listed = json.loads(ask(served.gate, "/v1/models", method="GET").text)
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert ask(served.gate, "/health", method="GET").status == 200


@pytest.mark.parametrize("end", ["leaves", "closes"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "prompt"), [(TEXT, {"prompt": WORD}), (CHAT, {"messages": HELLO})])
def test_generation_ends_with_its_client_or_server(folder: Any, path: str, prompt: Any, stream: bool, end: str) -> None:
    """Room for a million tokens, which would take an hour; the request waiting behind it never starts."""
    served = Served(folder, 1 << 20)
    body = json.dumps({**prompt, "max_tokens": 10**9, "stream": stream}).encode()

    async def run() -> None:
        clients = [Client(path, body) for _ in range(2)]
        tasks = [asyncio.ensure_future(client.ask(served.gate)) for client in clients]
        while served.state.manager.idle.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in tasks)
        if end == "closes":
            served.gate.close()
        else:
            for client in clients:
                client.gone.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
        # The thread is free for whoever comes next.
        assert await asyncio.to_thread(served.state.manager.idle.wait, 20)
        if end == "leaves":
            small = json.dumps({**prompt, "max_tokens": 2}).encode()
            later = await asyncio.wait_for(Client(path, small).ask(served.gate), 10)
            assert later.status == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{{ range(999999999) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages + 1 }}"],
)
def test_whatever_a_template_raises_is_the_client_s_answer(folder: Any, template: str) -> None:
    answer = Served(folder, POSITIONS, template).ask(CHAT, messages=HELLO)
    assert answer.status == 400, answer.text
    assert "the chat template of tiny refuses these messages" in answer.detail


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path, stream: bool) -> None:
    save(build("llama"), tmp_path)
    words = load_tokenizer(tmp_path)
    words.add_tokens(["beyond"])
    words.save_pretrained(tmp_path)
    answer = Served(tmp_path, POSITIONS).ask(TEXT, prompt="beyond", stream=stream)
    assert answer.status == 400, answer.text
    assert answer.detail.startswith(f"the prompt has token {len(words) - 1}\nexpected: one of the model's ")


def test_settings_that_cannot_generate_keep_a_server_from_starting(folder: Any) -> None:
    model = load(folder, device="cpu")
    model.generation_config.bad_words_ids = [[10**9]]
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ModelError, match="cannot generate: ") as caught:
        serve(lambda: model, lambda: load_tokenizer(folder), "tiny", port=port)
    assert "generation_config.json" in caught.value.fix
