"""Loading for serving, writing from the command line, and pipelines."""

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import make_plain, run, spawn
from packed_models import save_packed
from tiny_models import build, random_ids, save, tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline
from typer.testing import CliRunner

from llmprune.cli import app
from llmprune.errors import DeviceError, ModelError
from llmprune.serving import cpu_forms, loader
from llmprune.serving.decode_graphs import DecodeGraphs
from llmprune.serving.forms import Fragments
from llmprune.serving.loader import Sampling, encode, load, load_tokenizer, require_room, write
from llmprune.serving.quantizer import sparse_layers

IDS = random_ids(2, 12)
CHAT = "{% for message in messages %}w7 {{ message.content }} w8{% endfor %}"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pruned Llama: `dense` and `packed` 2:4."""
    return save_packed(tmp_path_factory.mktemp("models"), hidden_size=64, intermediate_size=96, eos_token_id=None)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without sparse kernels: what it computes is then that of the dense model, bit for bit."""
    monkeypatch.setattr(cpu_forms.cpu, "unavailable", lambda: "no compiler")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def forms(model: PreTrainedModel) -> set[str]:
    return {layer.form.name for _, layer in sparse_layers(model) if layer.form}


@pytest.mark.parametrize(("served", "names"), [("auto", {"dense"}), ("packed", {"unpacked"}), ("dense", {"dense"})])
def test_loads_packed_checkpoints_as_asked(folder: Path, no_kernels: None, served: Any, names: set[str]) -> None:
    model = load(folder / "packed", device="cpu", dtype="bfloat16", served=served)
    assert not model.training
    assert forms(model) == names
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder / "dense").eval()))


def test_loads_dense_checkpoints(folder: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    for served in ("auto", "dense"):
        assert torch.equal(
            logits(load(str(folder / "dense"), device="cpu", dtype=torch.bfloat16, served=served)), logits(stock)
        )


def test_loads_in_the_dtype_that_the_device_computes_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert load(folder / "packed", device="cpu", dtype=dtype).dtype == dtype
    for native in (True, False):
        monkeypatch.setattr(
            loader, "computed_in", lambda *_, native=native: torch.bfloat16 if native else torch.float32
        )
        assert load(folder / "packed", device="cpu").dtype == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("fused", [True, False])
def test_fuses_fragments(folder: Path, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr(Fragments, "refusal", lambda *_: None)
    model = load(folder / "packed", device="cpu", dtype=torch.bfloat16, fused=fused)
    assert forms(model) == {"fragments"}
    parts = [name for name, layer in sparse_layers(model) if layer.fusion is not None]
    assert len(parts) == (10 if fused else 0)


def test_packed_weights_of_a_dense_checkpoint_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"dense is not packed.*\n.*\n.*llmprune pack"):
        load(folder / "dense", served="packed")


def test_graphs_without_a_gpu_are_refused(folder: Path) -> None:
    with pytest.raises(DeviceError, match="CUDA graphs on the device 'cpu'"):
        load(folder / "packed", device="cpu", graphs=True)


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        load(tmp_path / "nothing")


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer files in"):
        load_tokenizer(tmp_path)


def test_no_template_file_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"chat template .* cannot be read"):
        load_tokenizer(folder / "dense", tmp_path / "nothing.jinja")


def test_encodes_text_chats_and_nothing(folder: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(folder / "dense")
    assert encode(plain, "w5 w6", chat=False).tolist() == [[5, 6]]
    assert encode(plain, "", chat=False).tolist() == [[1]]
    with pytest.raises(ModelError, match="has no chat template"):
        encode(plain, "w5", chat=True)
    (tmp_path / "chat.jinja").write_text(CHAT)
    assert encode(load_tokenizer(folder / "dense", tmp_path / "chat.jinja"), "w5", chat=True).tolist() == [[7, 5, 8]]


def test_an_empty_prompt_needs_a_beginning(folder: Path) -> None:
    plain = load_tokenizer(folder / "dense")
    plain.bos_token = None
    with pytest.raises(ModelError, match="the prompt is empty"):
        encode(plain, "", chat=False)


def test_writes_what_generate_writes(folder: Path) -> None:
    model, said = load(folder / "packed", device="cpu"), list[str]()
    written = write(model, tokenizer(), IDS[:1], Sampling(9, temperature=0), said.append)
    wanted = model.generate(IDS[:1], max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 12:]
    assert written.text == "".join(said) == tokenizer().decode(wanted, skip_special_tokens=True)
    assert len(said) > 1, "it comes in pieces"
    assert (written.prompt_tokens, written.tokens, written.finish) == (12, 9, "length")
    assert 0 < written.first_token_seconds <= written.seconds
    assert written.tokens_per_second == pytest.approx(8 / (written.seconds - written.first_token_seconds))
    assert write(model, tokenizer(), IDS[:1], Sampling(1)).tokens_per_second is None


def test_seeds_fix_the_draws(folder: Path) -> None:
    model = load(folder / "packed", device="cpu")
    texts = [write(model, tokenizer(), IDS[:1], Sampling(12, temperature=3.0, seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("as_list", [True, False])
def test_says_that_the_text_ended(folder: Path, as_list: bool) -> None:
    model = load(folder / "packed", device="cpu")
    second = int(model.generate(IDS[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)[0, -1])
    model.generation_config.eos_token_id = [second] if as_list else second
    for allowed in (2, 9):
        written = write(model, tokenizer(), IDS[:1], Sampling(allowed, temperature=0))
        assert (written.tokens, written.finish) == (2, "stop")


def test_ctrl_c_keeps_what_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = load(folder / "packed", device="cpu"), list[str]()
    whole = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 12:]
    forward, calls = model.forward, list[int]()

    def interrupted(**inputs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", interrupted)
    written = write(model, tokenizer(), IDS[:1], Sampling(9, temperature=0), said.append)
    assert (written.finish, written.tokens) == ("interrupted", 5)
    assert written.text == "".join(said) == tokenizer().decode(whole, skip_special_tokens=True)


def test_graphs_write_the_same(folder: Path) -> None:
    class Again:
        def record(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            return function

    stock, model = (load(folder / "packed", device="cpu", dtype=torch.float32) for _ in range(2))
    DecodeGraphs(model, Again(), smallest=16)
    sampling = Sampling(20, temperature=2.0, seed=5)
    assert write(model, tokenizer(), IDS[:1], sampling).text == write(stock, tokenizer(), IDS[:1], sampling).text
    assert model.decode_graphs.recorded


def test_pipelines_take_packed_checkpoints(folder: Path) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")("w5 w6", **options)
        for model in (str(folder / "dense"), str(folder / "packed"), load(folder / "packed", device="cpu"))
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0]["generated_text"].startswith("w5 w6")


def test_generate_prints_the_text_and_its_speed(folder: Path) -> None:
    result = run("generate", folder / "packed", "--prompt", "w5 w6", "--max-new-tokens", 5, "--temperature", 0)
    ids = load(folder / "packed", device="cpu").generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)
    assert result.exit_code == 0
    assert result.stdout == tokenizer().decode(ids[0, 2:], skip_special_tokens=True) + "\n"
    assert "5 tokens in " in result.stderr
    assert " tokens/s" in result.stderr
    assert "Loading weights" not in result.stderr


def test_generate_prints_json_and_nothing_else(folder: Path) -> None:
    result = run("generate", folder / "packed", "-p", "w5", "--max-new-tokens", 3, "--seed", 1, "--json", "--quiet")
    content = json.loads(result.stdout)
    assert content["model"] == str(folder / "packed")
    assert (content["tokens"], content["prompt_tokens"], content["finish"]) == (3, 1, "length")
    assert result.stderr == ""


def test_generate_reads_the_prompt_and_a_template(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[list[int]]] = []
    monkeypatch.setattr(
        loader, "write", lambda model, tokens, ids, *_: prompts.append(ids.tolist()) or written_nothing()
    )
    (tmp_path / "chat.jinja").write_text(CHAT)
    for options in ([], ["--chat-template", str(tmp_path / "chat.jinja")]):
        command = ["generate", str(folder / "packed"), "--prompt", "-", *options]
        assert CliRunner().invoke(app, command, input="w9 w4").exit_code == 0
    assert prompts == [[[9, 4]], [[7, 9, 4, 8]]]


def written_nothing() -> loader.Written:
    return loader.Written("", 1, 1, 0.1, 0.1, "length")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat"], "has no chat template"),
        (["--device", "cpu", "--graphs"], "CUDA graphs on the device 'cpu'"),
        (["--device", "cuda:77"], "0 CUDA devices"),
    ],
)
def test_generate_explains_what_cannot_be(folder: Path, options: list[str], message: str) -> None:
    if "cuda:77" in options and torch.cuda.is_available():
        pytest.skip("there are CUDA devices")
    result = run("generate", folder / "packed", "--prompt", "w5", *options, "--json")
    assert result.exit_code == 1
    assert message in result.stderr
    assert message in json.loads(result.stdout)["error"]["what"]


@pytest.mark.slow
def test_ctrl_c_prints_what_there_is_and_exits_130(folder: Path) -> None:
    # More tokens than any machine writes before it is stopped.
    process = spawn("generate", folder / "packed", "--prompt", "w5", "--max-new-tokens", 1_000_000, "--seed", 1)
    assert isinstance(process.stdout, io.TextIOBase)
    first = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).startswith("w")
    assert rest.endswith("\n")
    assert "tokens/s" in errors
    assert errors.splitlines()[-1] == "interrupted"


def test_loads_models_of_all_kinds(tmp_path: Path) -> None:
    for family in ("gpt2", "mixtral"):
        stock = build(family)
        model = load(save(stock, tmp_path / family), device="cpu")
        torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [
        {"eos_token_id": "x"},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "top_k": "5"},
        {"num_beams": 4},
        {"num_return_sequences": 3, "do_sample": True},
        {"bad_words_ids": [[10**9]]},
        {"repetition_penalty": 0.0},
        {"dola_layers": "high"},
    ],
    ids=str,
)
def test_settings_that_cannot_generate_are_named(folder: Path, setting: dict[str, Any]) -> None:
    model = load(folder / "dense", device="cpu")
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ModelError, match="cannot generate: ") as caught:
        write(model, tokenizer(), IDS[:1], Sampling(2))
    assert "generation_config.json" in caught.value.fix


def test_stop_strings_of_the_generation_config_are_obeyed() -> None:
    model, words = load("testbed", device="cpu"), load_tokenizer("testbed")
    ids = encode(words, "import numpy as", chat=False)
    whole = write(model, words, ids, Sampling(8, temperature=0))
    model.generation_config.stop_strings = [whole.text[:2]]
    stopped = write(model, words, ids, Sampling(8, temperature=0))
    assert whole.text.startswith(stopped.text)
    assert stopped.tokens < whole.tokens


def test_a_reader_who_leaves_is_not_the_model_s_fault(folder: Path) -> None:
    def gone(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        write(load(folder / "dense", device="cpu"), tokenizer(), IDS[:1], Sampling(8), gone)


@pytest.mark.parametrize(("positions", "left"), [(None, None), (13, 1), (100, 88)])
def test_room_for_an_answer(positions: int | None, left: int | None) -> None:
    assert require_room(IDS[:1], positions) == left
    with pytest.raises(ModelError, match="a prompt of 12 tokens for a model with 12 positions"):
        require_room(IDS[:1], 12)
