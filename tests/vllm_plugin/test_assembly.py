"""Layers of vLLM assembled from packed matrices, for every rank, without vLLM."""

import pytest
import torch
from cpu_matrices import needs_kernels
from torch import Tensor
from torch.nn import functional as F

from llmprune.errors import CheckpointError, FormatError, ModelError, NumericsError, PatternError
from llmprune.patterns import parse
from llmprune.storage.formats import DenseLayout, Layout, fit_layout, quantise
from llmprune.vllm_plugin.assembly import Assembly, Shape, choose, choose_all, served_in

CPU = torch.device("cpu")
PATTERNS = {
    "nm": "2:4", "block": "0.5@16x16", "bitmask": "0.6", "int8-nm": "2:4", "int8-bitmask": "0.6", "dense": "0.5",
}  # fmt: skip


def matrix(layout: str, rows: int, columns: int, seed: int = 0) -> tuple[Layout | None, dict[str, Tensor], Tensor]:
    """A layout, None for a dense matrix; its tensors; and the weight."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    pattern = parse(PATTERNS[layout]).compared("row")
    weight = weight * pattern.mask(weight.abs())
    if layout.startswith("int8"):
        weight = quantise(weight)
    fitted = fit_layout(layout, weight, pattern)
    return None if isinstance(fitted, DenseLayout) else fitted, fitted.pack(weight), weight


def assembled(shape: Shape, matrices: dict[str, tuple[Layout | None, dict[str, Tensor], Tensor]], ids: list) -> list:
    assembly = Assembly("layer", {name: layout for name, (layout, _, _) in matrices.items()}, shape)
    for shard_id, (_, tensors, _) in reversed(list(zip(ids, matrices.values(), strict=True))):
        for suffix, tensor in tensors.items():
            assert assembly.arriving[suffix] == tensor.dtype or suffix == "values"
            assembly.take(suffix, tensor, shard_id)
    return assembly.finish(CPU)


def product(layers: list, x: Tensor) -> Tensor:
    return torch.cat([layer(x) for layer in layers], dim=-1)


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())  # int8 forms round the activations


def qkv_shape(rank: int, ranks: int, dtype: torch.dtype = torch.float32) -> Shape:
    """Four query heads and two KV heads of 16."""
    kv = 16 * max(1, 2 // ranks)
    return Shape((64, 64), ((64, 64 // ranks), (32, kv), (32, kv)), rank, ranks, dtype)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "layouts",
    [*((name,) * 3 for name in PATTERNS if name != "dense"), ("nm", "dense", "nm"), ("block", "bitmask", "int8-nm")],
    ids=str,
)
def test_q_k_and_v_of_every_rank(layouts: tuple[str, str, str], ranks: int) -> None:
    sizes = (64, 32, 32)
    matrices = {name: matrix(layouts[n], sizes[n], 64, n) for n, name in enumerate("abc")}
    q, k, v = (weight for _, _, weight in matrices.values())
    x = torch.randn(5, 64)
    for rank in range(ranks):
        layers = assembled(qkv_shape(rank, ranks), matrices, ["q", "k", "v"])
        assert len(layers) == (1 if len(set(layouts)) == 1 else 3)
        head, copies = 64 // ranks, max(1, ranks // 2)
        kv = slice(rank // copies * (32 * copies // ranks), (rank // copies + 1) * (32 * copies // ranks))
        wanted = torch.cat([q[rank * head : (rank + 1) * head], k[kv], v[kv]])
        assert close(product(layers, x), F.linear(x, wanted))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layout", PATTERNS)
def test_inputs_shared_by_ranks_add_up(layout: str, ranks: int) -> None:
    found, weight = torch.zeros(3, 48), matrix(layout, 48, 64)[2]
    x = torch.randn(3, 64)
    for rank in range(ranks):
        shape = Shape((64, 64 // ranks), ((48, 48),), rank, ranks, torch.float32)
        layers = assembled(shape, {"down": matrix(layout, 48, 64)}, [None])
        found += product(layers, x.split(64 // ranks, dim=1)[rank].contiguous())
    assert close(found, F.linear(x, weight))


def test_a_matrix_that_is_fused_on_disk() -> None:
    fused = matrix("bitmask", 128, 64)
    x = torch.randn(2, 64)
    for rank in range(4):
        layers = assembled(qkv_shape(rank, 4), {"qkv": fused}, [None])
        own = torch.cat(
            [
                fused[2][part]
                for part in (
                    slice(16 * rank, 16 * rank + 16),
                    slice(64 + 16 * (rank // 2), 80 + 16 * (rank // 2)),
                    slice(96 + 16 * (rank // 2), 112 + 16 * (rank // 2)),
                )
            ]
        )
        assert close(product(layers, x), F.linear(x, own))


def test_a_matrix_that_fills_several_parts() -> None:
    shape = Shape((64, 64), ((32, 16), (16, 8), (48, 24)), 1, 2, torch.float32)
    wide, narrow = matrix("nm", 48, 64, 1), matrix("bitmask", 48, 64, 2)
    layers = assembled(shape, {"qkv": wide, "z": narrow}, [(0, 1), 2])
    x = torch.randn(2, 64)
    assert close(product(layers, x), F.linear(x, torch.cat([wide[2][16:32], wide[2][40:48], narrow[2][24:]])))


@pytest.mark.parametrize("dense_first", [True, False])
def test_a_dense_matrix_fills_what_the_packed_ones_leave(dense_first: bool) -> None:
    sizes = (32, 16, 48) if dense_first else (48, 32, 16)
    shape = Shape((64, 64), tuple((size, size) for size in sizes), 0, 1, torch.float32)
    packed, dense = matrix("nm", 48, 64, 1), matrix("dense", 48, 64, 2)
    names = {"qkv": dense, "z": packed} if dense_first else {"z": packed, "qkv": dense}
    layers = assembled(shape, names, [(0, 1), 2] if dense_first else [0, (1, 2)])
    x = torch.randn(2, 64)
    assert close(product(layers, x), F.linear(x, torch.cat([weight for _, _, weight in names.values()])))


def test_a_matrix_that_would_fill_all_parts_is_refused() -> None:
    shape = Shape((64, 64), ((16, 16),) * 4, 0, 1, torch.float32)
    large, small = matrix("nm", 96, 64)[0], matrix("nm", 16, 64)[0]
    for names in ({"a": large, "b": small, "c": small}, {"a": None, "b": small, "c": large}, {"a": large, "b": large}):
        with pytest.raises(ModelError, match="has room for"):
            Assembly("layer", names, shape)


def test_a_dense_matrix_of_another_model_is_refused() -> None:
    shape = Shape((64, 64), ((64, 64), (32, 32)), 0, 1, torch.float32)
    assembly = Assembly("layer", {"q": matrix("nm", 64, 64)[0], "k": None}, shape)
    for wrong in (torch.ones(64, 64), torch.ones(32, 128), torch.ones(32)):
        with pytest.raises(ModelError, match=r"the checkpoint has k as .*; layer has room for 32 x 64"):
            assembly.take("weight", wrong, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_outside_the_matrix_are_refused_by_every_rank(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_SELFTEST", "0")
    layout, tensors, _ = matrix("block", 64, 64)
    tensors["col"][-1] = 4
    for rank in range(ranks):
        with pytest.raises(FormatError, match="'col' has a block column out of range"):
            assembled(
                Shape((64, 64 // ranks), ((64, 64),), rank, ranks, torch.float32),
                {"down": (layout, tensors, None)},
                [None],
            )


def test_matrices_are_chosen_for_as_vllm_stacks_them() -> None:
    sizes = {"v_proj": ("nm", 16), "q_proj": ("bitmask", 64), "k_proj": ("nm", 16), "o_proj": ("nm", 64)}
    matrices = {name: matrix(kind, rows, 64)[0] for name, (kind, rows) in sizes.items()}
    chosen = choose_all({f"a.{name}": layout for name, layout in matrices.items()}, CPU, torch.float32)
    stacked = fit_layout("nm", torch.zeros(32, 64), parse("2:4").compared("row"))
    assert {name: choice.form.name for name, choice in chosen.items()} == {
        "a.q_proj": choose(matrices["q_proj"], CPU, torch.float32).form.name,
        "a.k_proj": choose(stacked, CPU, torch.float32).form.name,
        "a.v_proj": choose(stacked, CPU, torch.float32).form.name,
        "a.o_proj": choose(matrices["o_proj"], CPU, torch.float32).form.name,
    }


@needs_kernels
def test_a_matrix_with_few_zeros_is_served_as_its_neighbours_are() -> None:
    made = {"q_proj": 0.25, "k_proj": 0.7, "v_proj": 0.7}
    layouts = {}
    for name, sparsity in made.items():
        pattern = parse(str(sparsity)).compared("row")
        weight = torch.randn(64, 64)
        layouts[name] = fit_layout("bitmask", weight * pattern.mask(weight.abs()), pattern)
    alone = {name: choose(layout, CPU, torch.bfloat16).form.name for name, layout in layouts.items()}
    together = {name: choice.form.name for name, choice in choose_all(layouts, CPU, torch.bfloat16).items()}
    assert alone["q_proj"] == "dense"
    assert together == dict.fromkeys(layouts, "cpu-bitmask")


def test_weights_are_cast_and_only_the_share_of_a_rank_is_kept() -> None:
    layout, tensors, weight = matrix("nm", 64, 64)
    assembly = Assembly("layer", {"up": layout}, Shape((64, 64), ((64, 16),), 3, 4, torch.bfloat16))
    values = tensors["values"].clone()
    assembly.take("values", values)
    values.fill_(float("nan"))  # the loader's buffer is used again
    assembly.take("meta", tensors["meta"])
    (piece,) = assembly._pieces.values()
    assert {name: tensor.untyped_storage().nbytes() for name, tensor in piece.tensors.items()} == {
        "values": 16 * 32 * 2,
        "meta": 16 * 8,
    }
    (layer,) = assembly.finish(CPU)
    assert torch.equal(layer.unpack(), weight[48:].bfloat16())


def test_neighbours_of_one_kind_are_multiplied_at_once() -> None:
    matrices = {name: matrix("nm", 32, 64, seed) for seed, name in enumerate("ab")}
    (layer,) = assembled(Shape((64, 64), ((32, 32), (32, 32)), 0, 1, torch.float32), matrices, [0, 1])
    assert layer.out_features == 64


def test_matrices_with_a_kernel_are_never_dense() -> None:
    for name in ("nm", "block"):
        layout = matrix(name, 64, 64)[0]
        assert layout is not None
        assert served_in(layout, CPU, torch.float32) == "packed"
        assert choose(layout, CPU, torch.float32).form.name in ("cpu-nm", "blocks", "unpacked")
    other = fit_layout("nm", torch.zeros(64, 64), parse("1:4"))
    assert served_in(other, CPU, torch.float32) == "auto"
    assert choose(other, CPU, torch.float32).form.name == "dense"
    assert served_in(matrix("bitmask", 64, 64)[0], CPU, torch.float32) == "auto"  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("layout", ["nm", "block"])
def test_no_dense_form_exists_at_any_time(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the self-test, which makes that of one layer at a time."""
    packed, x = matrix(layout, 64, 64), torch.randn(3, 32)
    monkeypatch.setenv("LLMPRUNE_SELFTEST", "0")
    monkeypatch.setattr(type(packed[0]), "unpack", lambda layout, tensors: pytest.fail("a dense form was made"))
    shape = Shape((64, 32), ((64, 64),), 1, 2, torch.float32)
    assert close(product(assembled(shape, {"down": packed}, [None]), x), F.linear(x, packed[2][:, 32:]))


def test_missing_tensors_are_refused() -> None:
    layout, tensors, _ = matrix("nm", 64, 64)
    assembly = Assembly("layer", {"up": layout}, Shape((64, 64), ((64, 64),), 0, 1, torch.float32))
    assembly.take("values", tensors["values"])
    with pytest.raises(CheckpointError, match=r"up: meta did not arrive(.|\n)*--load-format dummy"):
        assembly.finish(CPU)


def test_what_does_not_belong_is_refused() -> None:
    layout, tensors, _ = matrix("nm", 64, 64)
    shape = Shape((64, 64), ((64, 64), (64, 64)), 0, 1, torch.float32)
    assembly = Assembly("layer", {"gate": layout, "up": None}, shape)
    for suffix, shard in (("mask", 0), ("meta", 1), ("meta", None)):
        with pytest.raises(ModelError, match=f"layer: the tensor '{suffix}' arrives for its parts"):
            assembly.take(suffix, tensors["meta"], shard)
    assembly.take("meta", tensors["meta"], 0)
    with pytest.raises(FormatError, match="'values' has shape"):
        assembly.take("values", tensors["values"][1:], 0)


def test_a_record_of_another_model_is_refused() -> None:
    layout = matrix("nm", 64, 64)[0]
    with pytest.raises(ModelError, match="the checkpoint has up as 64 x 64; layer has room for 48 x 64"):
        Assembly("layer", {"up": layout}, Shape((64, 64), ((48, 48),), 0, 1, torch.float32))


def test_weights_that_are_not_finite_are_refused() -> None:
    layout, tensors, _ = matrix("nm", 64, 64)
    assembly = Assembly("layer", {"up": layout}, Shape((64, 64), ((64, 64),), 0, 1, torch.float16))
    assembly.take("meta", tensors["meta"])
    with pytest.raises(NumericsError, match=r"up.values has values that are NaN or infinite in torch.float16"):
        assembly.take("values", tensors["values"] * 1e6)


def test_a_number_of_ranks_that_cuts_a_group_is_refused_with_the_way_out() -> None:
    layout, tensors, _ = matrix("block", 64, 96)
    assembly = Assembly("layer", {"down": layout}, Shape((96, 24), ((64, 64),), 1, 4, torch.float32))
    assembly.take("crow", tensors["crow"])
    assembly.take("col", tensors["col"])
    with pytest.raises(
        PatternError, match=r"down: a block matrix .* inside its blocks of 16(.|\n)*fix: use fewer ranks"
    ):
        assembly.take("values", tensors["values"])
