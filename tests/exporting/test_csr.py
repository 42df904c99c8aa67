"""CSR tensors: written, read by the loader and by torch, and refused when damaged."""

import doctest
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents, same, tensors
from packed_models import save_packed
from safetensors.torch import load_file, save_file
from tiny_models import build, save

from llmprune import export
from llmprune.errors import CheckpointError, FormatError, LlmpruneError
from llmprune.exporting.csr import load_csr, to_csr

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return save_packed(tmp_path, "bitmask", "0.6")


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_every_tensor_comes_back(made: Path, kind: str) -> None:
    before, dense = contents(made / kind), tensors(made / "dense")
    report = export(made / kind, "csr")
    assert contents(made / kind) == before
    assert report.output == made / f"{kind}-csr"
    state = load_csr(report.output)
    assert state.keys() == dense.keys()
    sparse = {key for key, tensor in state.items() if tensor.layout is torch.sparse_csr}
    assert sparse == {key for key in dense if key.endswith("proj.weight")}
    for key, tensor in state.items():
        assert same(tensor.to_dense() if key in sparse else tensor, dense[key] + 0.0)
    assert report.dense_bytes == sum(tensor.nbytes for tensor in dense.values())
    assert "14 of 14 as CSR" in report.facts["matrices"]


def test_products_are_those_of_the_dense_matrix_as_documented(made: Path) -> None:
    weight = tensors(made / "dense")[f"{LAYER}.weight"]
    assert weight.dtype == torch.bfloat16
    folder, names = export(made / "dense", "csr").output, dict[str, Any](load_csr=load_csr, torch=torch)
    for example in doctest.DocTestParser().get_examples(str(load_csr.__doc__)):
        exec(example.source.replace("out/pruned-csr", str(folder)).replace("576", str(weight.shape[1])), names)
    torch.testing.assert_close(names["y"], weight.float().sum(1))
    assert {tensor.dtype for tensor in names["state"].values()} == {torch.float32}
    assert same(names["state"][f"{LAYER}.weight"].to_dense(), weight.float() + 0.0)


def test_a_correction_of_low_rank_is_said_to_be_left_out(made: Path) -> None:
    said: list[str] = []
    for kind in ("dense", "packed"):
        export(made / kind, "csr", watch=lambda progress: said.append(progress.stage))
    assert not any("left out" in one for one in said)
    (made / "dense" / "adapter").mkdir()
    export(made / "dense", "csr", overwrite=True, watch=lambda progress: said.append(progress.stage))
    assert any(one.startswith("adapter/, a correction of low rank, is left out") for one in said)


def test_shards_stay_shards_and_nothing_takes_them_for_a_checkpoint(tmp_path: Path) -> None:
    folder = save(build("llama", torch.bfloat16), tmp_path / "shards", max_shard_size="40KB")
    report = export(folder, "csr", tmp_path / "out")
    assert [file.file for file in report.files] == [f"csr-{file.name}" for file in sorted(folder.glob("*.safetensors"))]
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert "tokenizer.json" in contents(tmp_path / "out")
    assert all(same(load_csr(tmp_path / "out")[key], tensor) for key, tensor in tensors(folder).items())


def test_empty_rows_and_negative_zeros() -> None:
    weight = torch.tensor([[0.0, -0.0, 0.0], [1.0, 0.0, float("nan")], [0.0, 0.0, 0.0]])
    parts = to_csr(weight)
    assert parts["crow"].tolist() == [0, 0, 2, 2]
    assert parts["col"].tolist() == [0, 2]
    assert {part.dtype for part in (parts["crow"], parts["col"])} == {torch.int32}


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / "csr.json").read_text())
        change(index)
        (folder / "csr.json").write_text(json.dumps(index))

    return apply


def tensored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = load_file(folder / "csr-model.safetensors")
        change(content)
        save_file(content, folder / "csr-model.safetensors")

    return apply


@pytest.mark.parametrize(
    "harm",
    [
        edited(lambda index: index.update(version=2)),
        edited(lambda index: index.update(files=["../a.safetensors"])),
        edited(lambda index: index.pop("matrices")),
        edited(lambda index: index["matrices"].update({LAYER: [1 << 40, 8]})),
        edited(lambda index: index["matrices"].update({LAYER: [7, 8]})),
        edited(lambda index: index["matrices"].update({"model.other": [7, 8]})),
        tensored(lambda content: content.pop(f"{LAYER}.col")),
        tensored(lambda content: content[f"{LAYER}.col"].fill_(100_000)),
        tensored(lambda content: content[f"{LAYER}.col"].fill_(-1)),
        tensored(lambda content: content[f"{LAYER}.col"].zero_()),
        tensored(lambda content: content[f"{LAYER}.crow"].fill_(1)),
        tensored(lambda content: content[f"{LAYER}.crow"][-1:].add_(5)),
        tensored(lambda content: content.update({f"{LAYER}.crow": content[f"{LAYER}.crow"].float()})),
        tensored(lambda content: content.update({f"{LAYER}.values": content[f"{LAYER}.values"][:-1].clone()})),
        lambda folder: (folder / "csr.json").write_text("{" * 5000),
        lambda folder: (folder / "csr.json").unlink(),
        lambda folder: (folder / "csr-model.safetensors").write_bytes(b"x" * 100),
    ],
)
def test_damaged_exports_are_refused(made: Path, harm: Callable[[Path], Any]) -> None:
    folder = export(made / "dense", "csr").output
    harm(folder)
    with pytest.raises((FormatError, CheckpointError)) as caught:
        load_csr(folder)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made: export(made / "dense", "onyx"), "export to 'onyx'"),
        (lambda made: export(made / "none", "csr"), "no folder"),
        (lambda made: export(made / "dense", "csr", made / "packed"), r"is not empty(.|\n)*fix: choose another"),
        (lambda made: export(made / "dense", "csr", made / "dense"), "is the model itself"),
    ],
)
def test_what_cannot_be_exported_is_refused(made: Path, call: Callable[[Path], Any], message: str) -> None:
    before = contents(made)
    with pytest.raises(LlmpruneError, match=message):
        call(made)
    assert contents(made) == before


def test_an_earlier_export_is_replaced_when_asked(made: Path) -> None:
    first = export(made / "dense", "csr")
    assert contents(export(made / "packed", "csr", first.output, overwrite=True).output)
    assert load_csr(first.output)
