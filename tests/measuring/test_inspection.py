"""Zeros counted and patterns named: what `patterns` makes is what `inspection` finds, and every refusal."""

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import save_file
from tiny_models import build, save
from torch import Tensor

from llmprune.errors import CheckpointError, PatternError
from llmprune.measuring.inspection import inspect_checkpoint
from llmprune.patterns import NM, Block, parse
from llmprune.progress import Progress
from llmprune.storage.detection import detect_pattern

SINGLE = "model.safetensors"


def pruned(pattern: str, shape: tuple[int, int] = (256, 512), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * parse(pattern).mask(torch.rand(shape, generator=generator))


def slow_groups(weight: Tensor, of: int) -> int:
    return max(sum(1 for value in group if value != 0) for group in weight.reshape(-1, of).tolist())


@pytest.mark.parametrize(
    "patterns",
    [
        ("1:2", "1:4", "2:4", "3:4", "1:8", "2:8", "4:8", "7:8", "1:16", "8:16", "16:32"),
        ("0.5@128x128", "0.5@64x64", "0.5@32x32", "0.5@16x16", "0.25@32x32", "0.875@16x16", "0.8984375@16x16"),
        ("0.03125/row", "0.25/row", "0.5/row", "0.875/row"),
        ("0.05", "0.3", "0.5", "0.666", "0.7", "0.95", "1.0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patterns_are_found(patterns: tuple[str, ...], dtype: torch.dtype) -> None:
    for pattern in patterns:
        found = detect_pattern(pruned(pattern).to(dtype))
        sparsity, *rest = re.split(r"(?=[@/])", pattern)
        assert found == (pattern if ":" in pattern else str(round(float(sparsity), 3)) + "".join(rest))


@pytest.mark.parametrize("pattern", ["0.0", "0.009", "0.009/row"])
def test_few_zeros_are_dense(pattern: str) -> None:
    assert detect_pattern(pruned(pattern)) == "dense"


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "8:16", "0.5@32x32", "0.25/row"])
def test_found_pattern_is_kept_by_a_slow_checker(pattern: str) -> None:
    weight = pruned(pattern)
    found = parse(detect_pattern(weight))
    if isinstance(found, NM):
        assert slow_groups(weight, found.of) == found.keep
    elif isinstance(found, Block):
        tiles = weight.unfold(0, found.size[0], found.size[0]).unfold(1, found.size[1], found.size[1])
        assert sum(not tile.any() for row in tiles for tile in row) == round(found.sparsity * 16 * 8)
    else:
        assert {int((row == 0).sum()) for row in weight} == {round(found.sparsity * 512)}


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 5), (63, 123), (128, 1), (1, 1000)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    weight = torch.ones(shape)
    assert detect_pattern(weight) == "dense"
    assert detect_pattern(torch.zeros(shape)) == "1.0"


@pytest.mark.parametrize(("pattern", "shape"), [("0.3/row", (63, 120)), ("0.37", (63, 123)), ("2:4", (63, 124))])
def test_patterns_on_odd_shapes(pattern: str, shape: tuple[int, int]) -> None:
    assert detect_pattern(pruned(pattern, shape)) == pattern


def test_empty_matrix_is_dense() -> None:
    assert detect_pattern(torch.zeros(0, 8)) == "dense"


def test_vector_has_no_pattern() -> None:
    with pytest.raises(PatternError, match=r"\(4,\)"):
        detect_pattern(torch.zeros(4))


def test_one_full_group_is_not_two_of_four() -> None:
    weight = pruned("2:4")
    weight[200, 500:504] = 1
    assert detect_pattern(weight) == "0.5/row"  # 255 of 256 rows have equal counts


def test_groups_are_aligned() -> None:
    assert detect_pattern(pruned("2:4").roll(1, dims=1)) == "0.5/row"


def test_few_more_zeros_keep_the_name() -> None:
    weight = pruned("2:4")
    weight.view(-1)[::100] = 0
    assert detect_pattern(weight) == "2:4"


def test_many_more_zeros_change_the_name() -> None:
    weight = pruned("2:4") * pruned("0.2", seed=1).bool()
    assert detect_pattern(weight) == "0.6"


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_conv1d_along_dim_0(pattern: str) -> None:
    assert detect_pattern(pruned(pattern).T) == f"{pattern} along dim 0"


def test_equal_counts_along_dim_0() -> None:
    assert detect_pattern(pruned("0.25/row").T) == "0.25/row along dim 0"


def test_whole_rows_and_columns() -> None:
    rows, columns = torch.ones(96, 200), torch.ones(96, 200)
    rows[::4] = 0
    columns[:, 10:30] = 0
    assert detect_pattern(rows) == "0.25 rows"
    assert detect_pattern(columns) == "0.1 columns"
    assert detect_pattern(rows * columns) == "0.325 rows and columns"


def test_alternate_columns_are_columns_first() -> None:
    weight = torch.ones(8, 8)
    weight[:, ::2] = 0
    assert detect_pattern(weight) == "0.5 columns"


def test_zero_rows_beside_another_pattern() -> None:
    weight, unstructured = pruned("2:4"), pruned("0.3")
    weight[:64] = 0
    unstructured[:32] = 0
    assert detect_pattern(weight) == "2:4, 64 zero rows"
    assert detect_pattern(unstructured) == "0.387, 32 zero rows"
    unstructured = pruned("0.3")
    unstructured[0] = 0
    assert "zero" not in detect_pattern(unstructured)  # one row of 256 holds too few of the zeros


def test_crossing_rows_and_columns_are_counted_once() -> None:
    weight = pruned("0.25", (96, 200))
    weight[:24] = 0
    weight[:, :100] = 0
    assert detect_pattern(weight).endswith(", 24 zero rows, 100 zero columns")


def test_blocks_must_divide() -> None:
    assert detect_pattern(pruned("0.5@32x32", (96, 160))) == "0.533@32x32"
    assert detect_pattern(pruned("0.5@8x8", (96, 96))) == "0.5"
    assert "@" not in detect_pattern(pruned("0.5@32x32", (96, 160))[1:])


def test_experts_are_matrices_of_the_last_two_dimensions() -> None:
    experts = torch.stack([pruned("2:4", (64, 128)), pruned("2:4", (64, 128)).flip(0)])
    assert detect_pattern(experts) == "2:4"
    assert detect_pattern(experts.transpose(1, 2)) == "2:4 along dim 1"
    blocks = torch.stack([pruned("0.5@16x16", (48, 64)), pruned("0.5@16x16", (48, 64)).flip(0)])
    assert detect_pattern(blocks) == "0.5@16x16"


def test_blocks_do_not_reach_into_the_next_expert() -> None:
    experts = torch.ones(4, 16, 32)
    experts.view(64, 32)[8:40, :16] = 0  # as one matrix of 64 rows not aligned; inside experts 0 to 2 neither
    experts[3, :, ::2] = 0
    assert "@32x32" not in detect_pattern(experts)


def test_columns_of_each_expert() -> None:
    experts = torch.ones(2, 16, 40)
    experts[0, :, :10] = 0
    experts[1, :, 30:] = 0
    assert detect_pattern(experts) == "0.25 columns"


def write_model(folder: Path) -> dict[str, Tensor]:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
        "model.layers.10.mlp.up_proj.weight": pruned("0.5/row", (16, 32)).bfloat16(),
        "model.layers.2.mlp.up_proj.weight": pruned("2:4", (16, 32)).bfloat16(),
        "model.layers.2.norm.weight": torch.tensor([0.0, 1.0, -0.0, 2.0]),
    }
    save_file(tensors, folder / SINGLE)
    return tensors


def test_rows_and_summary(tmp_path: Path) -> None:
    tensors = write_model(tmp_path)
    inspection = inspect_checkpoint(tmp_path)

    assert [row.name for row in inspection.rows] == [
        "model.embed_tokens.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.norm.weight",
        "model.layers.10.mlp.up_proj.weight",
    ]
    embedding, two_of_four, norm, half = inspection.rows
    assert (two_of_four.pattern, half.pattern, norm.pattern, embedding.pattern) == ("2:4", "0.5/row", None, "1.0")
    assert (norm.zeros, norm.negative_zeros, norm.sparsity) == (2, 1, 0.5)
    assert (half.shape, half.dtype, half.bytes, half.zeros) == ((16, 32), "bfloat16", 1024, 256)
    assert inspection.parameters == 32 + 2 * 512 + 4
    assert inspection.nonzeros == sum(int((tensor != 0).sum()) for tensor in tensors.values())
    assert inspection.matrix_sparsity == 0.5
    assert inspection.sparsity == pytest.approx((32 + 512 + 2) / 1060)
    assert inspection.bytes_on_disk == (tmp_path / SINGLE).stat().st_size


def test_dictionary_is_json(tmp_path: Path) -> None:
    weight = write_model(tmp_path)["model.layers.2.mlp.up_proj.weight"]
    inspection = inspect_checkpoint(tmp_path)
    content = json.loads(json.dumps(inspection.to_dict()))
    assert content["parameters"] == inspection.parameters
    assert content["matrix_sparsity"] == 0.5
    assert content["tensors"][1] == {
        "name": "model.layers.2.mlp.up_proj.weight",
        "shape": [16, 32],
        "dtype": "bfloat16",
        "elements": 512,
        "zeros": 256,
        "negative_zeros": int(((weight == 0) & weight.signbit()).sum()),
        "sparsity": 0.5,
        "pattern": "2:4",
        "bytes": 1024,
        "layout": "dense",
    }


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_negative_zeros_are_zeros(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, 1.0, -0.0, -1.0], [2.0, -0.0, -2.0, -0.0]])
    save_file({"w": weight.to(dtype)}, tmp_path / SINGLE)
    (row,) = inspect_checkpoint(tmp_path).rows
    assert (row.zeros, row.negative_zeros, row.pattern) == (4, 3, "1:2")


def test_smallest_subnormal_is_no_zero(tmp_path: Path) -> None:
    smallest = torch.tensor([1, -32767], dtype=torch.int16).view(torch.bfloat16)
    save_file({"w": smallest}, tmp_path / SINGLE)
    assert inspect_checkpoint(tmp_path).rows[0].zeros == 0


def test_int8_weights_count_and_packed_words_do_not(tmp_path: Path) -> None:
    save_file(
        {
            "int8": torch.zeros(4, 4, dtype=torch.int8),
            "packed": torch.zeros(4, 4, dtype=torch.int32),
            "mask": torch.zeros(4, 4, dtype=torch.uint8),
            "scale": torch.zeros(4, 4, dtype=torch.uint8).view(torch.float8_e8m0fnu),  # 2^-127: it has no zero
            "fp4": torch.zeros(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        },
        tmp_path / SINGLE,
    )
    rows = {row.name: row for row in inspect_checkpoint(tmp_path).rows}
    assert (rows["int8"].zeros, rows["int8"].pattern) == (16, "1.0")
    assert all(rows[name].zeros == 0 and rows[name].pattern is None for name in ("packed", "mask", "scale", "fp4"))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(-0.0), "empty": torch.zeros(0, 4)}, tmp_path / SINGLE)
    empty, scalar = inspect_checkpoint(tmp_path).rows
    assert (empty.elements, empty.sparsity, empty.pattern) == (0, 0.0, "dense")
    assert (scalar.zeros, scalar.negative_zeros, scalar.pattern) == (1, 1, None)


def test_random_model_is_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file({"a": torch.randn(64, 64), "b": torch.randn(63, 5)}, tmp_path / SINGLE)
    assert [row.pattern for row in inspect_checkpoint(tmp_path).rows] == ["dense", "dense"]


def write_shards(folder: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(4, 4)}, folder / f"{name}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("index", [True, False])
def test_shards_with_and_without_index(tmp_path: Path, index: bool) -> None:
    write_shards(tmp_path)
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    assert [row.name for row in inspect_checkpoint(tmp_path).rows] == ["a", "b"]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        inspect_checkpoint(tmp_path)


def test_same_tensor_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(4)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor w is in .*b\.safetensors"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -8])
def test_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    write_model(tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read") as caught:
        inspect_checkpoint(tmp_path)
    assert "again" in caught.value.fix


def test_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        inspect_checkpoint(tmp_path / "missing")


def test_a_config_that_contradicts_the_tensors_is_shown(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path)
    assert inspect_checkpoint(folder).contradiction is None
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"num_key_value_heads": 1}, "k_proj.bias' holds 16, and config.json requires 8"),
        ({"num_hidden_layers": 3}, "has no values for 'model.layers.2."),
        ({"hidden_size": 30, "head_dim": None}, "hidden size (30) is not a multiple"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        assert said in str(inspect_checkpoint(folder).contradiction)
        assert said in str(inspect_checkpoint(folder).to_dict()["contradiction"])
    for other in ({"model_type": "bert", "architectures": ["BertModel"]}, {"model_type": "unheard-of"}):
        (folder / "config.json").write_text(json.dumps(other))
        assert inspect_checkpoint(folder).contradiction is None


def test_files_that_transformers_does_not_read_contradict_nothing(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path)
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    assert inspect_checkpoint(folder).contradiction is None


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(build("llama"), tmp_path / "dense")

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("unable to mmap 65057956176 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr("llmprune.measuring.inspection.safe_open", fail)
    with pytest.raises(CheckpointError, match="unable to mmap") as caught:
        inspect_checkpoint(folder)
    assert "more memory" in caught.value.fix


def test_masks_in_the_folder_are_counted_and_are_no_weights(tmp_path: Path) -> None:
    """With an index and without one, where every file of safetensors would be one of weights."""
    save_file({"a.weight": torch.ones(8, 4)}, tmp_path / "model-00001.safetensors")
    assert inspect_checkpoint(tmp_path).masks is None
    save_file({"a.weight": torch.ones(8, 1, dtype=torch.uint8)}, tmp_path / "masks.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert ([row.name for row in found.rows], found.masks, found.to_dict()["masks"]) == (["a.weight"], 1, 1)


def test_every_tensor_is_told(tmp_path: Path) -> None:
    """From which the bar has how much is left."""
    write_shards(tmp_path)
    told: list[Progress] = []
    rows = inspect_checkpoint(tmp_path, told.append, "counting").rows
    assert [(one.stage, one.layer, one.layers) for one in told] == [
        ("counting", number, len(rows)) for number in range(1, len(rows) + 1)
    ]


def test_the_table_says_what_masks_are_for(tmp_path: Path) -> None:
    save_file({"a.weight_orig": torch.ones(8, 4), "a.weight_mask": torch.eye(8, 4)}, tmp_path / SINGLE)
    save_file({"a.weight": torch.ones(8, 1, dtype=torch.uint8)}, tmp_path / "masks.safetensors")
    shown = "".join(run("inspect", tmp_path).stdout.split())
    for words in (
        "1 tensor stored with a mask of torch.nn.utils.prune; `llmprune import` writes an ordinary",
        f"of 1 matrix in {tmp_path / 'masks.safetensors'}, to train on with llmprune.keep_zeros(model, FILE)",
    ):
        assert words.replace(" ", "") in shown
