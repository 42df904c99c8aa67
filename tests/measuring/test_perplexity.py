"""Perplexity at the end of what float64 and JSON can say."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import make_plain, run
from folders import tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune import TextSpec, perplexity, perplexity_against, prune
from llmprune.models.source import ModelSource
from llmprune.progress import Progress
from llmprune.storage.report import load_report
from llmprune.stream.stream import StreamSettings


def logits_of(scale: float, folder: Path) -> Path:
    """A checkpoint whose logits are very sure of themselves, and mostly wrong."""
    source = tiny_models.save(tiny_models.build("llama"), folder)
    weights = tensors(source)
    weights["lm_head.weight"] *= scale
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.fixture
def text(tmp_path: Path) -> TextSpec:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{number}" for number in torch.randint(40, 100, (100,)).tolist()))
    return TextSpec(str(file), samples=4, length=16, order="text")


def test_a_perplexity_beyond_float64_is_infinite(tmp_path: Path, text: TextSpec) -> None:
    sure, hopeless = (perplexity(logits_of(scale, tmp_path / str(scale)), text) for scale in (1.0, 1e4))
    assert sure.perplexity == math.exp(sure.nats)
    assert 710 < hopeless.nats < 1e6
    assert hopeless.perplexity == math.inf
    content = json.loads(json.dumps(hopeless.to_dict(), allow_nan=False))
    assert content["perplexity"] is None
    assert content["nats"] == hopeless.nats


def test_the_largest_perplexity_is_still_a_number() -> None:
    from llmprune.measuring.perplexity import _summary
    from llmprune.measuring.scoring import Scores
    from llmprune.text.tokens import Tokens

    tokens = Tokens(torch.zeros(1, 2, dtype=torch.int64), "", {})
    source = ModelSource(tiny_models.build("llama"))
    for nats, wanted in ((709.0, math.exp(709.0)), (709.79, math.inf)):
        scores = Scores(1)
        scores.add(torch.tensor([[-nats, -0.1]], dtype=torch.float64), torch.tensor([0]), torch.tensor([0]))
        assert _summary(scores, tokens, source).perplexity == wanted


def test_a_hopeless_run_is_reported_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)
    source = logits_of(1e4, tmp_path / "dense")
    settings: Any = tiny_models.recipe(pattern=0.9, method="random", evaluation={"samples": 2})
    report = prune(source, settings, tmp_path / "out")
    assert report.pruned_perplexity == math.inf
    content = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert content["evaluation"]["pruned"]["perplexity"] is None
    assert content["evaluation"]["pruned"]["nats"] > 710
    assert load_report(tmp_path / "out") == report
    assert "| inf |" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "recipe.json").write_text(json.dumps(settings))
    arguments = ["prune", source, "--recipe", tmp_path / "recipe.json", "--output", tmp_path / "out", "--resume"]
    assert " -> inf" in run(*arguments).stdout


def test_a_divergence_that_is_not_finite_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)
    monkeypatch.setattr("torch.nn.functional.kl_div", lambda other, *rest, **options: torch.full_like(other, math.inf))
    source = tiny_models.save(tiny_models.build("llama"), tmp_path / "dense")
    arguments = ["prune", source, "--recipe", "demo", "--output", tmp_path / "out"]
    small = ("calibration.samples=2", "calibration.length=8", "evaluation.samples=1", "evaluation.length=8")
    shown = run(*arguments, *[part for setting in small for part in ("--set", setting)]).stdout
    assert "not finite" in shown
    content = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert content["evaluation"]["kl_divergence"] is None
    assert "| not finite |" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_prints_null(tmp_path: Path, text: TextSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)
    source = logits_of(1e4, tmp_path / "dense")
    arguments = ["perplexity", source, "--text", text.source, "--length", 16, "--samples", 4]
    content = json.loads(run(*arguments, "--json").stdout, parse_constant=pytest.fail)
    assert content["perplexity"] is None
    assert f"{content['nats']:.5f}" in run(*arguments).stdout


def test_settings_have_a_default(tmp_path: Path, text: TextSpec) -> None:
    source = tiny_models.save(tiny_models.build("llama"), tmp_path / "dense")
    assert perplexity(source, text) == perplexity(source, text, StreamSettings(batch_size=8))


def reference_calibration_error(folder: Path, words: list[int], length: int, samples: int) -> float:
    """Guo et al. (2017) in plain loops and float64, from the logits of a stock model that is loaded whole."""
    ids = torch.tensor(words)[: samples * length].view(samples, length)  # this tokenizer puts nothing in front
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.double()
    confidences, likeliest = logits.softmax(-1)[:, :-1].reshape(-1, logits.shape[-1]).max(-1)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, token, target in zip(
        confidences.tolist(), likeliest.tolist(), ids[:, 1:].reshape(-1).tolist(), strict=True
    ):
        number = next(m for m in range(1, 16) if confidence <= m / 15 + 1e-12)
        bins.setdefault(number, []).append((confidence, token == target))
    total = sum(map(len, bins.values()))
    return sum(
        len(rows) / total * abs(sum(hit for _, hit in rows) / len(rows) - sum(c for c, _ in rows) / len(rows))
        for rows in bins.values()
    )


# At 30, confidences are spread over the bins; at 1, all are in the first.
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_calibration_error_is_that_of_plain_loops(scale: float, tmp_path: Path, text: TextSpec) -> None:
    source = logits_of(scale, tmp_path / "model")
    words = [int(word[1:]) for word in Path(text.source).read_text().split()]
    found = perplexity(source, text).calibration_error
    assert found == pytest.approx(reference_calibration_error(source, words, 16, 4), rel=1e-4)


def test_a_model_that_is_sure_and_wrong_is_not_calibrated(tmp_path: Path, text: TextSpec) -> None:
    result = perplexity(logits_of(1e4, tmp_path / "model"), text)
    assert result.calibration_error == pytest.approx(1.0, abs=0.1)
    assert result.to_dict()["calibration_error"] == result.calibration_error


def test_the_calibration_error_does_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, text: TextSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = logits_of(30.0, tmp_path / "model")
    whole = perplexity(source, text).calibration_error
    monkeypatch.setattr("llmprune.stream.stream.window_positions", lambda *_: 7)
    assert perplexity(source, text).calibration_error == pytest.approx(whole, rel=1e-6)


def test_a_comparison_does_not_depend_on_how_many_logits_are_computed_at_once(
    tmp_path: Path, text: TextSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the rounding of matmuls of other sizes, that is, seven digits of each position's logits in float32."""
    dense, other = (logits_of(scale, tmp_path / str(scale)) for scale in (30.0, 20.0))
    whole = perplexity_against(other, dense, text).to_dict()
    seen: list[Progress] = []
    monkeypatch.setattr("llmprune.stream.stream.window_positions", lambda *_: 5)
    parts = perplexity_against(other, dense, text, watch=seen.append).to_dict()
    for found, wanted in ((parts, whole), (parts["dense"], whole["dense"]), (parts["pruned"], whole["pruned"])):
        for key, value in wanted.items():
            assert found[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else found[key])
    heads = [(step.layer, step.layers) for step in seen if step.stage == "perplexity, head"]
    assert heads[-1] == (64, 64)
    assert len(heads) == 4 * 4


def test_a_bin_ends_with_its_upper_bound() -> None:
    from llmprune.measuring.scoring import Scores

    # 0.4 is 6 / 15: the end of the sixth bin, with 0.35. In one bin, a hit and a miss pull against one another.
    probabilities = torch.tensor([[0.4, 0.3, 0.3], [0.35, 0.34, 0.31]], dtype=torch.float64)
    scores = Scores(1)
    scores.add(probabilities.log(), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert scores.calibration_error == pytest.approx(abs(1 - 0.75) / 2)


def test_the_standard_error_is_that_of_the_sequences(tmp_path: Path, text: TextSpec) -> None:
    """Against the textbook: sequences of equal length, in float64, from a stock model that is loaded whole."""
    source = logits_of(30.0, tmp_path / "model")
    words = [int(word[1:]) for word in Path(text.source).read_text().split()]
    ids = torch.tensor(words)[:64].view(4, 16)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(source)(ids).logits.double()
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    wanted = statistics.stdev((-picked.mean((1, 2))).tolist()) / 4**0.5
    result = perplexity(source, text, StreamSettings(batch_size=3))
    assert result.nats_stderr == pytest.approx(wanted, rel=1e-4)
    assert result.to_dict()["stderr"] == pytest.approx(result.perplexity * wanted, rel=1e-4)
    assert perplexity(source, replace(text, samples=1)).stderr is None


def test_sequences_of_different_lengths_count_by_their_tokens() -> None:
    from llmprune.measuring.scoring import Scores

    losses, places = [1.0, 2.0, 3.0, 9.0, 5.0], [0, 0, 0, 1, 2]
    scores = Scores(3)
    for part in (slice(0, 2), slice(2, 5)):  # a sequence may be split among windows
        own = torch.tensor([[-loss, -50.0] for loss in losses[part]], dtype=torch.float64)
        scores.add(own, torch.zeros(len(own), dtype=torch.int64), torch.tensor(places[part]))
    sums, counts, mean = (6.0, 9.0, 5.0), (3, 1, 1), 20 / 5
    wanted = (3 / 2 * sum((a - mean * n) ** 2 for a, n in zip(sums, counts, strict=True))) ** 0.5 / 5
    assert scores.stderr == pytest.approx(wanted)
    assert scores.nats == 20


def test_the_standard_error_of_the_change_pairs_the_sequences(tmp_path: Path, text: TextSpec) -> None:
    """Against the textbook: the difference of each sequence, from two measurements of one model and the other."""
    dense, pruned = logits_of(30.0, tmp_path / "dense"), logits_of(29.0, tmp_path / "pruned")
    means = []
    for folder in (dense, pruned):
        words = [int(word[1:]) for word in Path(text.source).read_text().split()]
        ids = torch.tensor(words)[:64].view(4, 16)
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.double()
        picked = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
        means.append(picked.mean((1, 2)))
    wanted = statistics.stdev((means[1] - means[0]).tolist()) / 4**0.5
    result = perplexity_against(pruned, dense, text, StreamSettings(batch_size=3))
    assert result.change_stderr == pytest.approx(wanted, rel=1e-3)
    assert result.dense.nats_stderr is not None
    assert result.change_stderr is not None
    assert result.change_stderr < result.dense.nats_stderr
    assert result.to_dict()["change_stderr"] == result.change_stderr
    assert perplexity_against(pruned, dense, replace(text, samples=1)).change_stderr is None
    shown = run(
        "perplexity", str(pruned), "--against", str(dense), "--text", text.source, "--length", "16", "--samples", "4"
    )
    assert "standard error, paired" in shown.stdout, shown.stderr


def test_both_models_of_a_comparison_are_calibrated(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("llama"), tmp_path / "dense")
    settings: Any = tiny_models.recipe(pattern=0.9, method="random", evaluation={"samples": 2})
    evaluation = prune(source, settings, tmp_path / "out").to_dict()["evaluation"]
    found = [evaluation[which]["calibration_error"] for which in ("dense", "pruned")]
    assert all(0 < value < 1 for value in found)
    assert found[0] != found[1]


def test_every_sequence_begins_with_bos_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    """As transformers computes it on sequences that begin with BOS, which is read and not scored."""
    folder = Path(__file__).parents[2] / "eval" / "testbed"
    documents = [" ".join(f"word{(7 * i + j * j) % 97}" for j in range(40)) for i in range(6)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    found = perplexity(
        folder, TextSpec(str(tmp_path / "text.jsonl"), samples=6, length=32, order="text"), None, "float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    flat = [token for text in documents for token in tokenizer(text)["input_ids"]]
    ids = torch.tensor(flat[: 6 * 32]).view(6, 32)
    assert (ids[1:, 0] != tokenizer.bos_token_id).any()
    ids[:, 0] = tokenizer.bos_token_id
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.double()
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    scored = losses[ids[:, 1:] != tokenizer.bos_token_id]
    assert found.predicted_tokens == len(scored) < 6 * 31
    assert found.nats == pytest.approx(float(scored.mean()), rel=1e-5)
