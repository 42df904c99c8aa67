"""Texts that do not fit the model: said before anything is computed, by whatever command would read them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_models import VOCABULARY, build, recipe, save, tokenizer

import llmprune.text.loading
from llmprune import TextSpec, perplexity, prune
from llmprune.errors import CalibrationError, ModelError
from llmprune.pruning.forecast.forecast import dry_run


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{number % 100}" for number in range(4000)))
    return str(file)


def by_prune(folder: Path, spec: dict[str, object], output: Path) -> None:
    prune(folder, recipe(calibration=spec, evaluation=None), output)


def by_dry_run(folder: Path, spec: dict[str, object], output: Path) -> None:
    dry_run(folder, recipe(calibration=spec, evaluation=None))


def by_perplexity(folder: Path, spec: dict[str, object], output: Path) -> None:
    perplexity(folder, TextSpec(**spec))  # type: ignore[arg-type] # any option


EVERYWHERE = pytest.mark.parametrize("use", [by_prune, by_dry_run, by_perplexity])
Use = Callable[[Path, dict[str, object], Path], None]


@EVERYWHERE
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_samples_longer_than_the_positions(family: str, use: Use, text: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path / "model")
    use(folder, {"source": text, "samples": 2, "length": 64}, tmp_path / "fits")
    with pytest.raises(CalibrationError, match="sequences of 65 tokens for a model with 64 positions"):
        use(folder, {"source": text, "samples": 2, "length": 65}, tmp_path / "output")


def test_a_length_that_is_left_out_is_what_the_model_has_positions_for(text: str, tmp_path: Path) -> None:
    folder = save(build("gpt2"), tmp_path / "model")
    spec = {"source": text, "samples": 2}
    plan = dry_run(folder, recipe(calibration=spec))
    report = prune(folder, recipe(calibration=spec, evaluation={"source": text, "samples": 1}), tmp_path / "pruned")
    for known in (plan.recipe, report.header["recipe"], yaml.safe_load((tmp_path / "pruned/recipe.yaml").read_text())):
        assert known["calibration"]["length"] == 64
    assert report.header["recipe"]["evaluation"]["length"] == 64
    assert prune(build("gpt2"), recipe(), tokenizer=tokenizer()).header["recipe"]["calibration"]["length"] == 24
    assert perplexity(folder, TextSpec(text, samples=2)).length == 64
    bloom = save(build("bloom", max_position_embeddings=None), tmp_path / "bloom")
    assert dry_run(bloom, recipe(calibration={"samples": 2})).recipe["calibration"]["length"] == 512


@EVERYWHERE
def test_a_file_that_is_not_there(use: Use, tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    with pytest.raises(CalibrationError, match=r"no such file or folder: missing\.txt"):
        use(folder, {"source": "missing.txt", "length": 16}, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_missing_evaluation_text_is_noticed_before_the_calibration_text_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmprune.text.loading, "generate_text", lambda *_: pytest.fail("text was sampled"))
    folder = save(build("llama"), tmp_path / "model")
    with pytest.raises(CalibrationError, match=r"no such file or folder: heldout\.txt"):
        prune(folder, recipe(evaluation={"source": "heldout.txt"}), tmp_path / "output")


def test_a_short_evaluation_text_is_noticed_before_the_calibration_text_is_written(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmprune.text.loading, "generate_text", lambda *_: pytest.fail("text was sampled"))
    folder = save(build("llama"), tmp_path / "model")
    evaluation = {"source": text, "samples": 100_000, "length": 16}
    with pytest.raises(CalibrationError, match="give 325 of 100000 sequences"):
        prune(folder, recipe(evaluation=evaluation), tmp_path / "output")


@pytest.mark.parametrize("use", [by_prune, by_perplexity])
def test_tokens_that_the_model_does_not_know(use: Use, text: str, tmp_path: Path) -> None:
    folder = save(build("llama", vocab_size=64), tmp_path / "model")
    tokenizer().save_pretrained(folder)
    with pytest.raises(CalibrationError, match=r"produces token \d+, but the model has only 64 embeddings"):
        use(folder, {"source": text, "samples": 2, "length": 32}, tmp_path / "output")
    assert VOCABULARY > 64


def test_a_model_without_a_tokenizer_prunes_on_text_that_it_writes(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("llama").save_pretrained(folder)
    evaluation = {"source": "self", "samples": 1}
    assert prune(folder, recipe(evaluation=evaluation), tmp_path / "pruned").header["texts"]["calibration"]
    assert prune(build("llama"), recipe(evaluation=evaluation), tmp_path / "saved").dense_perplexity
    assert perplexity(folder, TextSpec(samples=1, length=16)).samples == 1
    with pytest.raises(ModelError, match="no tokenizer files in"):
        by_prune(folder, {"source": text, "samples": 2, "length": 16}, tmp_path / "output")


def test_a_tokenizer_that_cannot_be_read_is_refused_even_where_none_is_needed(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer in"):
        prune(folder, recipe(), tmp_path / "pruned")


@pytest.mark.parametrize(("device", "sizes"), [("cpu", (32, 512)), ("cuda", (128, 2048))])
def test_what_a_text_leaves_open_suits_the_device(device: str, sizes: tuple[int, int]) -> None:
    fitted = TextSpec().fitted(None, device)
    assert (fitted.samples, fitted.length) == sizes
    assert (TextSpec().fitted(100, device).length, TextSpec(length=8).fitted(4, device).length) == (100, 8)
    assert TextSpec(samples=3).fitted(None, device).samples == 3
    assert fitted.summary == f"{sizes[0]} sequences of {sizes[1]:,} tokens, generated by the dense model"
