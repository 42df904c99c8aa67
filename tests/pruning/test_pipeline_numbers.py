"""What a run reports and stores, checked against transformers and plain torch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from folders import same, tensors, zeros
from front_door import DTYPES, LENGTH, inputs_of, on_text, samples, save_dense, unchanged, write_words
from safetensors.torch import save_file
from tiny_models import build, recipe, save
from transformers import AutoModelForCausalLM

from llmprune import prune


@pytest.fixture(scope="module", params=DTYPES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with unchanged(save_dense(request.param, tmp_path_factory.mktemp("dense"))) as folder:
        yield folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.mark.parametrize("held_back", [0, 2])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("matrix", ["self_attn.q_proj", "mlp.down_proj"])
def test_errors_are_measured_on_the_right_rows(
    dense: Path, words: Path, tmp_path: Path, held_back: int, layer: int, matrix: str
) -> None:
    """On the held-back samples, as the pruned prefix and the still dense layer hand them to the matrix."""
    settings = on_text(words, held_back=held_back, statistics={"token_weight": "none"})
    report = prune(dense, settings, tmp_path / "pruned")
    before, after = tensors(dense), tensors(tmp_path / "pruned")
    name = f"model.layers.{layer}.{matrix}"
    prefix = {key: after[key] for key in after if layer and key.startswith("model.layers.0.")}
    ids = samples(words)
    rows = inputs_of(dense, name, ids[6:8] if held_back else ids[:6], prefix)
    old, new = (tensors[f"{name}.weight"].double() for tensors in (before, after))
    expected = float((rows @ (old - new).T).square().sum() / (rows @ old.T).square().sum())
    (row,) = (row for row in report.rows if row.name == name)
    assert row.error == pytest.approx(expected, rel=0.02 if dense.name == "bf16" else 1e-4)
    assert row.tokens == 6 * LENGTH


@pytest.mark.parametrize("compute_dtype", ["auto", "float32", "bfloat16"])
def test_a_layer_sees_its_prefix_as_it_is_stored(dense: Path, words: Path, tmp_path: Path, compute_dtype: str) -> None:
    """Pruning layer 1 of a model whose layer 0 is pruned already gives the bits of the whole run."""
    settings = dict(on_text(words, compute_dtype=compute_dtype, held_back=0))
    prune(dense, settings, tmp_path / "whole")
    whole, before = tensors(tmp_path / "whole"), tensors(dense)
    prefix = save(AutoModelForCausalLM.from_pretrained(dense), tmp_path / "prefix")
    mixed = {name: whole[name] if name.startswith("model.layers.0.") else before[name] for name in before}
    save_file(mixed, prefix / "model.safetensors", metadata={"format": "pt"})
    prune(prefix, {**settings, "include": ["*.layers.1.*"]}, tmp_path / "second")
    second = tensors(tmp_path / "second")
    expected = {
        **before,
        **{name: whole[name] for name in whole if name.startswith(("model.layers.0", "model.layers.1"))},
    }
    assert all(same(second[name], expected[name]) for name in expected)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_the_compute_dtype_leaves_no_trace_in_what_is_not_pruned(
    dense: Path, tmp_path: Path, compute_dtype: str
) -> None:
    report = prune(
        dense, recipe(method="wanda", exclude=["*.o_proj"], compute_dtype=compute_dtype), tmp_path / "pruned"
    )
    before, after = tensors(dense), tensors(tmp_path / "pruned")
    pruned = {f"{row.name}.weight": row for row in report.rows}
    for name in before:
        if name in pruned:
            assert pruned[name].zeros == zeros(after[name])
            assert same(after[name], before[name].where(after[name] != 0, torch.zeros((), dtype=before[name].dtype)))
        else:
            assert same(after[name], before[name])


def test_what_underflows_in_the_compute_dtype_is_still_pruned(tmp_path: Path) -> None:
    """In a matrix that stays dense, tiny values are what they were; in a pruned one they are zeros."""
    source = save(build("llama"), tmp_path / "dense")
    before = tensors(source)
    tiny = [name for name in before if name.endswith(("q_proj.weight", "o_proj.weight"))]
    for name in tiny:
        before[name][::2] *= 1e-9
    save_file(before, source / "model.safetensors", metadata={"format": "pt"})
    settings = recipe(method="magnitude", exclude=["*.o_proj"], pattern=0.25, compute_dtype="float16")
    report = prune(source, settings, tmp_path / "pruned")
    after = tensors(tmp_path / "pruned")
    counted = {f"{row.name}.weight": row.zeros for row in report.rows}
    for name in tiny:
        if name in counted:
            assert counted[name] == zeros(after[name]) >= after[name].numel() // 2
        else:
            assert same(after[name], before[name])


def test_perplexity_is_what_transformers_gives(dense: Path, words: Path, tmp_path: Path) -> None:
    ids = samples(words)[10:14]
    file = tmp_path / "evaluation.txt"
    file.write_text(" ".join(f"w{number}" for number in ids.reshape(-1).tolist()))
    ids = ids.reshape(-1)[: 4 * LENGTH].view(4, LENGTH)
    settings = on_text(words, evaluation={"source": str(file), "samples": 4}, compute_dtype="float32", batch_size=3)
    report = prune(dense, settings, tmp_path / "pruned")
    logits = {}
    for which, folder in (("dense", dense), ("pruned", tmp_path / "pruned")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits[which] = model(ids).logits[:, :-1].double().log_softmax(-1)
    nats = {which: F.nll_loss(values.flatten(0, 1), ids[:, 1:].flatten()) for which, values in logits.items()}
    evaluation = report.header["evaluation"]
    assert report.dense_perplexity == pytest.approx(float(nats["dense"].exp()), rel=1e-5)
    assert report.pruned_perplexity == pytest.approx(float(nats["pruned"].exp()), rel=1e-5)
    assert evaluation["dense"]["predicted_tokens"] == 4 * (LENGTH - 1)
    before, after = logits["dense"], logits["pruned"]
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert evaluation["kl_divergence"] == pytest.approx(float(divergence), rel=1e-4)
    assert evaluation["agreement"] == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
