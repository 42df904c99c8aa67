"""Options that are passed on to lm-eval: what they change, and what is refused before any weights are loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from command_line import make_plain, run
from transformers import AutoTokenizer

from llmprune.errors import DeviceError
from llmprune.measuring.tasks import EvaluationError, HarnessSettings, run_tasks
from llmprune.measuring.tasks.checks import generation_options

pytestmark = pytest.mark.usefixtures("harness")

TEMPLATE = "{% for m in messages %}w9 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w8 {% endif %}"


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small Llama with a chat template."""
    folder = tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("talking"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_what_is_passed_on(
    talking: Path, tasks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plain(monkeypatch)
    # By its name, which only the folder makes known.
    monkeypatch.setattr("llmprune.measuring.tasks.tasks._OURS", ("llmprune_", "tiny_"))
    options = ["--include-path", Path(tasks[0]).parent, "--gen-kwargs", "max_gen_toks=2", "--apply-chat-template"]
    shared = ["--limit", 2, "--device-map", "auto", "--log-samples", "--output", tmp_path / "eval.json"]
    result = run("eval", talking, "--tasks", "tiny_write", *options, *shared, "--quiet", "--json")
    assert result.exit_code == 0, result.stderr
    results, samples = (Path(name) for name in json.loads(result.stdout)["files"])
    asked = [json.loads(line)["arguments"]["gen_args_0"] for line in samples.read_text().splitlines()]
    assert len(asked) == 2
    for question in asked:
        assert question["arg_0"].startswith("w9 ")
        assert question["arg_0"].rstrip().endswith("w8")
        assert question["arg_1"]["max_gen_toks"] == 2
    recorded = json.loads(results.read_text())
    assert recorded["config"]["gen_kwargs"] == {"max_gen_toks": 2}
    assert recorded["chat_template"] == TEMPLATE
    assert recorded["config"]["model_args"]["device_map"] == "auto"
    assert json.loads(result.stdout)["settings"]["include_path"] == str(Path(tasks[0]).parent)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"log_samples": True}, "log_samples without an output file"),
        ({"include_path": Path("nowhere")}, "no folder nowhere"),
        ({"gen_kwargs": "warm"}, "gen_kwargs 'warm' cannot be read"),
        ({"gen_kwargs": "temperature=1"}, "for tasks that generate no text"),
        ({"apply_chat_template": True}, "has no chat template"),
        ({"device_map": "nowhere"}, "device_map 'nowhere'"),
        ({"device_map": "auto", "device": "cpu"}, "device 'cpu' and device_map 'auto'"),
    ],
)
def test_refused_before_any_weights(
    changes: dict[str, Any], said: str, llama: Path, tasks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("llmprune.measuring.tasks.model.load", fail)
    with pytest.raises((EvaluationError, DeviceError), match=said) as caught:
        run_tasks(llama, tasks[:2], settings=HarnessSettings(quiet=True, **changes))
    assert caught.value.fix


def test_arguments_of_generation() -> None:
    assert generation_options(None) is None
    wanted = {"temperature": 0.7, "do_sample": True}
    assert generation_options("temperature=0.7,do_sample=True") == wanted
    assert generation_options('{"temperature": 0.7, "do_sample": true}') == wanted
    for text in ("", "{}", "{", "a=", "[1]"):
        with pytest.raises(EvaluationError, match="cannot be read"):
            generation_options(text)
