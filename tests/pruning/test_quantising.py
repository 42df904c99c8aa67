"""Runs that quantise what they keep: stored as 8 bits, the same from all ways, and refused where it means nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tensors, untimed, weights_and_texts
from recipe_cases import refusal
from runs import stop_early
from tiny_models import build, random_ids, recipe, save
from transformers import AutoModelForCausalLM

from llmprune import pack, prune, unpack
from llmprune.storage.files import read_json
from llmprune.storage.formats import quantise
from llmprune.storage.packed_config import packed_layouts

FITTED = {"epochs": 2, "lr": 3e-3, "sequences": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", torch.bfloat16, **SIZES), tmp_path_factory.mktemp("model"))


def quantising(**changes: Any) -> dict[str, Any]:
    return recipe(**{"pattern": "2:4", "quantise": {"bits": 8}, **changes})


def layouts(folder: Path) -> set[str]:
    return {layout.name for layout in packed_layouts(read_json(folder / "config.json")).values()}


@pytest.mark.parametrize(
    ("method", "pattern", "group", "layout"),
    [
        ("sparsegpt", "2:4", 128, "int8-nm"),
        ("wanda", "0.5/row", 16, "int8-bitmask"),
        ("random", "0.5", "row", "int8-bitmask"),
        (["wanda", "refit"], "2:4", "row", "int8-nm"),
    ],
)
def test_eight_bits_are_stored_and_load_as_the_dense_ones(
    llama: Path, tmp_path: Path, method: Any, pattern: str, group: int | str, layout: str
) -> None:
    settings = quantising(method=method, pattern=pattern, quantise={"bits": 8, "group": group})
    prune(llama, settings, tmp_path / "dense")
    report = prune(llama, {**settings, "format": "auto"}, tmp_path / "packed")
    assert layouts(tmp_path / "packed") == {layout}
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    dense = tensors(tmp_path / "dense")
    assert all(torch.equal(value, dense[key]) for key, value in tensors(tmp_path / "unpacked").items())
    for row in report.rows:
        assert [part.step for part in row.losses][-1] == "quantise"
        weight = dense[f"{row.name}.weight"]
        assert torch.equal(quantise(weight, weight.shape[1] if group == "row" else group), weight)
        assert row.zeros == int((weight == 0).sum()) >= weight.numel() // 2
    ids = random_ids(1, 8)
    with torch.inference_mode():
        both = [AutoModelForCausalLM.from_pretrained(tmp_path / one)(ids).logits for one in ("dense", "packed")]
    assert (both[0] - both[1]).norm() <= 0.02 * both[0].norm()


def test_fitted_layers_are_quantised_afterwards_and_resume_to_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = quantising(held_back=2, reconstruct=FITTED, format="auto")
    whole = prune(llama, settings, tmp_path / "whole")
    stop_early(monkeypatch, llama, settings, tmp_path / "resumed")
    again = prune(llama, settings, tmp_path / "resumed", resume=True)
    assert weights_and_texts(tmp_path / "resumed") == weights_and_texts(tmp_path / "whole")
    assert untimed(again) == untimed(whole)
    assert layouts(tmp_path / "whole") == {"int8-nm"}


def test_four_bits_are_stored_as_dense_values(llama: Path, tmp_path: Path) -> None:
    report = prune(llama, quantising(quantise={"bits": 4, "group": 32}, format="auto"), tmp_path / "out")
    assert layouts(tmp_path / "out") == {"nm"}
    unpack(tmp_path / "out", tmp_path / "dense")
    weights = tensors(tmp_path / "dense")
    for row in report.rows:
        part = weights[f"{row.name}.weight"][:, :32].float()
        assert len(torch.unique((part * 7 / part.abs().amax(1, keepdim=True)).round())) <= 15


def test_pack_finds_eight_bits_by_the_values(llama: Path, tmp_path: Path) -> None:
    prune(llama, quantising(), tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    assert layouts(tmp_path / "packed") == {"int8-nm"}
    prune(llama, quantising(quantise=None), tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "plain-packed")
    assert layouts(tmp_path / "plain-packed") == {"nm"}


def test_recipes_that_cannot_be_meant() -> None:
    assert "quantise without a pattern" in str(refusal({"structures": {"ffn": {"remove": 0.25}}, "quantise": {}}))
    for value in ({"bits": 3}, {"group": 0}, {"group": "column"}, {"damping": -1}):
        assert "quantise" in str(refusal({"pattern": "2:4", "method": "wanda", "quantise": value}))
