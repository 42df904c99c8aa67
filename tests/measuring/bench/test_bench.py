"""What `llmprune bench` measures, how, and what it refuses to report."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from cpu_matrices import needs_kernels
from packed_models import save_packed
from typer.testing import CliRunner

from llmprune.cli.measuring import add_commands
from llmprune.cli.tables.measuring import bench_tables, ratio_note
from llmprune.devices import cpu_threads
from llmprune.errors import CheckpointError, ModelError, NumericsError, RecipeError
from llmprune.kernels import workspace
from llmprune.measuring.bench import bench as benching
from llmprune.measuring.bench import decoding, products, record
from llmprune.measuring.bench.decoding import measure_decoding, resident_bytes
from llmprune.measuring.bench.machine import Rates, device_name, measure_rates, versions
from llmprune.measuring.bench.record import read_results
from llmprune.serving import forms, loader
from llmprune.serving.fusion import fuse
from llmprune.storage.formats import Int8BitmaskLayout
from llmprune.timing import Effort

CPU = torch.device("cpu")
FAST = Effort(0.0, rotated_bytes=1)
RATES = Rates(copy=1e9, matmul=1e12)
# Blocks of 16 divide these.
SIZES = {"hidden_size": 64, "intermediate_size": 320}


def load(folder: Path, **options: Any) -> Any:
    return loader.load(folder, device="cpu", dtype="bfloat16", **options)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU serve blocks as small as those of tiny models."""
    monkeypatch.setattr(forms, "CPU_BLOCK_SIZE", 16)
    monkeypatch.setattr(forms, "CPU_BLOCK_WEIGHTS", 0)
    monkeypatch.setattr(forms, "CPU_BLOCK_SPARSITY", 0.85)  # a tenth of few blocks is rounded up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, nine of ten blocks zero: `packed` and `dense`."""
    return save_packed(tmp_path_factory.mktemp("blocks"), "block", "0.9@16x16", **SIZES)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take no time for rates, copies and the whole model."""
    monkeypatch.setattr(benching, "measure_rates", lambda *_: RATES)
    monkeypatch.setattr(Effort, "copies", lambda *_: 2)
    monkeypatch.setattr(decoding, "_NEW_TOKENS", (2, 2))
    monkeypatch.setattr(
        benching, "measure_decoding", lambda models, batch, _, prompt: measure_decoding(models, batch, 0)
    )


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TERM", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: object) -> Any:
    app = typer.Typer()
    add_commands(app)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_floor_is_what_takes_longer() -> None:
    assert RATES.floor(2e9, 1e12) == (2.0, "bytes")
    assert RATES.floor(1e9, 3e12) == (3.0, "arithmetic")


def test_rates_and_versions_are_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["llmprune.measuring.bench.machine"]._COPIED, "cpu", 1 << 20)
    monkeypatch.setitem(sys.modules["llmprune.measuring.bench.machine"]._MULTIPLIED, "cpu", 64)
    rates = measure_rates(CPU, torch.float32, FAST)
    assert rates.copy > 1e6
    assert rates.matmul > 1e6
    assert versions()["torch"] == torch.__version__
    assert device_name(CPU).endswith(f", {cpu_threads()}")


@pytest.mark.parametrize(("matmul", "said"), [(9e8, "0.9 GFLOP/s"), (1.33e11, "133 GFLOP/s"), (2e12, "2.00 TFLOP/s")])
def test_rates_are_said_in_units_that_show_digits(matmul: float, said: str) -> None:
    note = ratio_note({"copy_per_second": 12.3e9, "matmul_per_second": matmul})
    assert f"12.3 GB/s copied or {said} multiplied" in note
    assert "exceed 100%" in note


# Products.


def test_equal_products_are_measured_once(folder: Path) -> None:
    found = products.packed_products(load(folder / "packed"))
    shapes = {product.shape: sorted(name for names in product.names for name in names) for product in found}
    assert shapes[320, 64] == [f"model.layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("gate", "up")]
    assert sum(len(product.names) for product in found) == 14
    assert all(len(product.layers) == 1 and set(product.layouts) == {n for (n,) in product.names} for product in found)


def test_layers_differ_by_the_share_that_they_store() -> None:
    layout = forms.BlockLayout((64, 64), 16, 8, balanced=False)
    same, other = (forms.BlockLayout((64, 64), 16, blocks, balanced=False) for blocks in (8, 9))
    assert products.kind(layout) == products.kind(same)
    assert products.kind(layout) != products.kind(other)
    assert products.kind(layout) != products.kind(forms.BlockLayout((64, 64), 16, 8, balanced=True))


@needs_kernels
def test_products_of_8_bits_are_right_by_their_own_rounding(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, "int8-bitmask", "0.5", torch.float32, **SIZES) / "packed"
    model = loader.load(folder, device="cpu", dtype="float32")
    product = products.packed_products(model)[0]
    assert product.form == "cpu-int8"
    (row,) = products.compare_product(product.layers, [4], RATES, FAST)
    assert row.sparse is not None
    one, other = (products.kind(Int8BitmaskLayout((64, 64), stored, 64)) for stored in (2048, 2050))
    assert one == other != products.kind(Int8BitmaskLayout((64, 64), 3000, 64))


def test_a_fusion_is_one_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms.Fragments, "refusal", lambda *_: None)
    model = load(save_packed(tmp_path, **SIZES, attention_bias=True) / "packed", fused=False)
    assert len(fuse(model, input_ids=torch.zeros(1, 1, dtype=torch.long))) == 4
    found = {product.shape: product for product in products.packed_products(model)}
    attention = found[64 + 32 + 32, 64]
    assert attention.names[0] == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert len(attention.names) == 2
    layers = products.sparse_candidate(attention)
    assert layers == attention.layers
    (row,) = products.compare_product(layers, [3], RATES, Effort(0.0, rotated_bytes=1 << 15))
    assert row.ratio is not None
    assert row.error <= 2 * row.dense_error + 1e-6
    assert products.served_bytes(layers) == (128 // 16) * 1 * (8 * 32 * 4 + 32 * 4) * 4


def test_a_right_product_is_timed_beside_the_dense_one(folder: Path) -> None:
    product = products.packed_products(load(folder / "packed"))[0]
    (row,) = products.compare_product(product.layers, [4], RATES, FAST)
    assert row.dense is not None
    assert row.sparse is not None
    assert row.ratio == row.dense.median / row.sparse.median
    shown = row.to_dict()
    stored = product.layers[0].layout.nbytes(2)
    moved = 4 * (64 + 64) * 2
    assert shown["bound"] == "bytes"
    assert row.floor == pytest.approx((stored + moved) / RATES.copy)
    assert row.dense_floor == pytest.approx((64 * 64 * 2 + moved) / RATES.copy)
    assert shown["sparse"]["share"] == pytest.approx(row.floor / row.sparse.median, abs=1e-4)


@needs_kernels
@pytest.mark.parametrize("layout", ["bitmask", "int8-bitmask"])
def test_in_float32_the_dense_side_has_the_weights_of_16_bits_that_load_would_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    model = loader.load(save_packed(tmp_path, layout, "0.5", **SIZES) / "packed", device="cpu", dtype="float32")
    layers = products.packed_products(model)[0].layers
    rows = sum(layer.out_features for layer in layers)
    for least, itemsize in ((0, 2), (1 << 20, 4)):
        monkeypatch.setattr(products, "MEASURED_WEIGHTS", least)
        (row,) = products.compare_product(layers, [4], RATES, FAST)
        assert row.dense is not None
        assert row.dense_floor == pytest.approx((rows * 64 * itemsize + 4 * (64 + rows) * 4) / RATES.copy)


@pytest.mark.parametrize("wrong", [0.05, math.nan])
def test_a_wrong_product_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    product = products.packed_products(load(folder / "packed"))[0]
    right = forms.BlockForm.multiply
    monkeypatch.setattr(forms.BlockForm, "multiply", lambda *given: right(*given) * (1 + wrong))
    monkeypatch.setattr(products, "time_calls", lambda *_: pytest.fail("timed"))
    (row,) = products.compare_product(product.layers, [4], RATES, FAST)
    shown = row.to_dict()
    assert shown["correct"] is False
    assert "ratio" not in shown
    assert not {"dense", "sparse"} & set(shown)
    json.dumps(shown, allow_nan=False)
    result = {"products": [{"names": [["a.q_proj"]], "comparisons": [shown]}]}
    with pytest.raises(NumericsError, match=r"a\.q_proj with 4 tokens"):
        benching.require_right(result)


def test_what_is_served_dense_is_measured_where_there_is_a_kernel(tmp_path: Path) -> None:
    half = products.packed_products(load(save_packed(tmp_path / "a", "block", "0.5@16x16", **SIZES) / "packed"))[0]
    assert half.form == "dense"
    candidate = products.sparse_candidate(half)
    assert candidate is not None
    assert candidate[0].form is not None
    assert candidate[0].form.name == "blocks"
    torch.testing.assert_close(candidate[0].unpack(), half.layers[0].unpack())
    pairs = products.packed_products(load(save_packed(tmp_path / "b", "nm", "1:4", **SIZES) / "packed"))[0]
    assert products.sparse_candidate(pairs) is None


# The whole model.


def test_decoding_generates_what_it_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder / "dense")
    # Were an end of sequence heeded, every run would stop at its first token.
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    lengths: list[tuple[int, int]] = []
    generate = model.generate

    def counted(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        made = generate(ids, **options)
        lengths.append((made.shape[1] - ids.shape[1], options["max_new_tokens"]))
        return made

    monkeypatch.setattr(model, "generate", counted)
    (found,) = measure_decoding([model], 2, 0.0)
    assert (found.batch, found.new_tokens, found.prompt_tokens) == (2, 8, 32)
    assert lengths == [(8, 8)] * 6
    assert found.tokens_per_second == pytest.approx(2 / found.later_token.median)


def test_models_are_timed_in_turn_and_token_by_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token takes most of the time here; the others are timed by themselves, and not by a difference."""
    models, order = [load(folder / "dense"), load(folder / "dense")], []
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    ticks = itertools.count()
    for number, model in enumerate(models):
        generate = model.generate

        def noted(*given: Any, number: int = number, generate: Any = generate, **options: Any) -> Any:
            order.append(number)
            return generate(*given, **options)

        monkeypatch.setattr(model, "generate", noted)
    found = measure_decoding(models, 1, 0.0)
    assert order == [0, 1] * 3 + [0, 1, 1, 0, 0, 1]
    # A tick for the prompt and one a token: the clock is read as often as a token is there.
    assert [row.first_token.median for row in found] == [2.0, 2.0]
    assert [row.later_token.median for row in found] == [1.0, 1.0]


def test_what_is_shared_is_held_once(folder: Path) -> None:
    model = load(folder / "dense")
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    # Scratch of the kernels, which other tests may have reserved.
    scratch = workspace.reserved(CPU)
    assert resident_bytes(model) == whole + scratch
    model.lm_head.weight = model.model.embed_tokens.weight
    assert resident_bytes(model) == whole + scratch - model.lm_head.weight.nbytes
    packed = load(folder / "packed")
    assert resident_bytes(packed) - scratch < 0.35 * whole


# The command.


@pytest.mark.usefixtures("quick", "plain")
def test_the_command_measures_shows_and_keeps(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    options = ["--tokens", "1,9", "--batches", "1,2", "--seconds", "0.001", "--quiet"]
    shown = run("bench", folder / "packed", *options, "--output", output)
    assert shown.exit_code == 0
    result = read_results(output)[device_name(CPU)]
    assert [row["tokens"] for row in result["products"][0]["comparisons"]] == [1, 9]
    assert all(product["served"] == product["measured"] == "blocks" for product in result["products"])
    model = result["whole_model"]
    assert [row["batch"] for row in model["batches"]] == [1, 2] == [row["batch"] for row in model["dense"]["batches"]]
    assert model["resident_bytes"] < model["dense"]["resident_bytes"]
    extent, dense = model["extent"], model["dense"]["extent"]
    assert extent["nonzeros"] == dense["nonzeros"] < extent["parameters"] == dense["parameters"]
    assert extent["nbytes"] < dense["nbytes"]
    text = " ".join(shown.stdout.split())
    assert "model.layers.0-1: mlp.gate_proj, mlp.up_proj 320 x 64, kernel: blocks" in text
    # A custom operator alone takes longer than these small products: slower, and said so.
    assert "SLOWER" in text
    assert str(output) in "".join(shown.stdout.split())
    assert len(result["products"]) > 1
    unmeasured = [{**product, "measured": None, "reason": "of a reason"} for product in result["products"]]
    tables = bench_tables({**result, "products": unmeasured})
    assert sum("no sparse kernel to measure: of a reason" in str(part) for part in tables) == 1
    options[3] = "1"
    again = run("bench", folder / "packed", *options, "--output", output, "--against", folder / "dense", "--json")
    assert json.loads(again.stdout)["whole_model"]["dense"]["model"] == str(folder / "dense")
    assert list(read_results(output)) == [device_name(CPU)]


@pytest.mark.usefixtures("quick", "plain")
def test_models_without_room_for_both_are_timed_one_after_the_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "free_bytes", lambda device: 1000)
    options = ["--against", folder / "packed", "--batches", "1", "--output", tmp_path / "bench.json", "--quiet"]
    shown = run("bench", folder / "dense", *options)
    assert "timed one after the other" in " ".join(shown.stdout.split())
    model = read_results(tmp_path / "bench.json")[device_name(CPU)]["whole_model"]
    assert not model["in_turn"]
    assert model["resident_bytes"] > model["dense"]["resident_bytes"]


@pytest.mark.usefixtures("quick", "plain")
def test_a_dense_checkpoint_is_measured_whole(folder: Path, tmp_path: Path) -> None:
    options = ["--batches", "1", "--output", tmp_path / "bench.json", "--json", "--tune"]
    shown = run("bench", folder / "dense", *options)
    result = json.loads(shown.stdout)
    assert result["products"] == []
    assert "dense" not in result["whole_model"]
    assert "nothing to tune" in shown.stderr
    assert "batch of 1" in shown.stderr


@pytest.mark.usefixtures("quick", "plain")
def test_results_that_cannot_be_written_are_shown_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("cannot write bench.json: no space left on device")

    monkeypatch.setattr(record, "write_result", full)
    shown = run("bench", folder / "dense", "--batches", "1", "--output", tmp_path / "bench.json", "--quiet")
    assert shown.exit_code == 1
    assert "no space left" in shown.stderr
    assert "tokens/s" in shown.stdout
    assert "written to" not in shown.stdout


@pytest.mark.usefixtures("quick", "plain")
def test_a_wrong_kernel_ends_the_command_with_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPRUNE_SELFTEST", "0")
    monkeypatch.setattr(
        forms.BlockForm, "multiply", lambda self, layout, held, x, bias: x.new_ones(len(x), layout.shape[0])
    )
    monkeypatch.setattr(benching, "measure_models", lambda models, *_: [{"batches": []} for _ in models])
    shown = run("bench", folder / "packed", "--tokens", "1", "--output", tmp_path / "b.json", "--quiet")
    assert shown.exit_code == 1
    assert "WRONG, not timed" in shown.stdout
    assert "sparse matmuls are wrong" in shown.stderr
    rows = read_results(tmp_path / "b.json")[device_name(CPU)]["products"][0]["comparisons"]
    assert [row["correct"] for row in rows] == [False]


@pytest.mark.usefixtures("plain")
def test_mistakes_are_explained(folder: Path, tmp_path: Path) -> None:
    assert run("bench", tmp_path / "nothing").exit_code == 1
    assert "no folder" in run("bench", tmp_path / "nothing").stderr
    assert run("bench", folder / "packed", "--tokens", "1,x").exit_code == 2
    assert "of at least 1" in run("bench", folder / "packed", "--tokens", "0").stderr
    with pytest.raises(RecipeError):
        benching.BenchSettings(batches=())
    (tmp_path / "bench.json").write_text('{"format": 3, "devices": {}}')
    damaged = run("bench", folder / "packed", "--output", tmp_path / "bench.json")
    assert damaged.exit_code == 1
    assert "not a result of `llmprune bench`" in damaged.stderr


def test_a_model_whose_cache_cannot_be_recorded_is_measured_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(model: str, *, device: str, dtype: str, graphs: bool = False, **served: str) -> str:
        asked.append((graphs, served))
        if graphs:
            raise ModelError("a step cannot be recorded")
        return f"{model} on {device} in {dtype}"

    monkeypatch.setattr("llmprune.serving.loader.load", load)
    assert benching._load(torch.device("cuda"), benching.BenchSettings(), "m", served="dense") == "m on cuda in auto"
    assert asked == [(True, {"served": "dense"}), (False, {"served": "dense"})]
    assert benching._load(torch.device("cpu"), benching.BenchSettings(dtype="float32"), "m") == "m on cpu in float32"
    assert len(asked) == 3
