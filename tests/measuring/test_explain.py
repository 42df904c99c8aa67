"""What `llmprune explain` says of packed and other checkpoints, on a CPU and as on a GPU."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import typer
from cpu_matrices import needs_kernels
from packed_models import save_packed
from typer.testing import CliRunner
from uneven_models import save_uneven

from llmprune.cli.measuring import add_commands
from llmprune.measuring import explain as explaining
from llmprune.measuring.bench.machine import device_name
from llmprune.measuring.bench.record import BENCH_NAME, write_result
from llmprune.measuring.explain import Explanation, explain
from llmprune.serving import cpu_forms, forms
from llmprune.storage.files import Stored, read_index
from llmprune.storage.formats import layout_from_dict

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {"hidden_size": 64, "intermediate_size": 320}
# Sizes that fragments need not pad.
WHOLE = {"hidden_size": 256, "intermediate_size": 512}
NO_COMPILER = "no C++ compiler: install g++"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU serve blocks as small as those of tiny models."""
    monkeypatch.setattr(forms, "CPU_BLOCK_SIZE", 16)
    monkeypatch.setattr(forms, "CPU_BLOCK_WEIGHTS", 0)
    monkeypatch.setattr(forms, "CPU_BLOCK_SPARSITY", 0.85)  # a tenth of few blocks is rounded up


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours, 80 columns, and no weights."""
    for name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TERM", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU for which nothing can be compiled."""
    monkeypatch.setattr(cpu_forms.cpu, "unavailable", lambda: NO_COMPILER)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with sparse tensor cores, as far as the choice of a form looks."""
    monkeypatch.setattr(forms.nm_linear, "supported", lambda device: None)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(explaining, "device_name", lambda device: "a GPU")


def run(*arguments: object) -> Any:
    app = typer.Typer()
    add_commands(app)
    result = CliRunner().invoke(app, ["explain", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def only(found: Explanation) -> tuple[set[str], set[str]]:
    """The forms and the reasons that occur."""
    return {row.form for row in found.packed}, {row.reason for row in found.packed}


@pytest.mark.parametrize(
    ("layout", "pattern", "reason"),
    [
        ("nm", "2:4", NO_COMPILER),
        ("nm", "1:4", "only 2:4 has a kernel"),
        ("bitmask", "0.7", NO_COMPILER),
        ("bitmask", "0.2", "a CPU is faster with the dense matrix if a bitmask takes more than 75% of its bytes"),
        ("block", "0.5@16x16", "a CPU is faster with the dense matrix below 85% block sparsity"),
    ],
)
def test_a_cpu_gains_nothing_from_these(
    tmp_path: Path, no_compiler: None, layout: str, pattern: str, reason: str
) -> None:
    found = explain(save_packed(tmp_path, layout, pattern, **SIZES) / "packed", CPU)
    assert len(found.packed) == 14
    assert only(found) == ({"dense"}, {reason})
    assert {row.limit for row in found.packed} == {1.0}
    assert found.limit == 1.0
    assert all(row.packed_bytes < row.dense_bytes == row.served_bytes for row in found.packed)


@needs_kernels
@pytest.mark.parametrize(("layout", "pattern", "form"), [("nm", "2:4", "cpu-nm"), ("bitmask", "0.7", "cpu-bitmask")])
def test_a_cpu_gains_from_what_it_has_kernels_for(tmp_path: Path, layout: str, pattern: str, form: str) -> None:
    found = explain(save_packed(tmp_path, layout, pattern, **WHOLE) / "packed", CPU)
    assert only(found) == ({form}, {""})
    for row in found.packed:
        # A header and room to read beyond the last weight come with each matrix.
        assert row.packed_bytes < row.served_bytes <= row.packed_bytes + 1024
        assert row.limit == row.dense_bytes / row.served_bytes > 1.7


def test_a_cpu_gains_from_few_blocks(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, "block", "0.9@16x16", **SIZES)
    found = explain(folder / "packed", CPU)
    assert only(found) == ({"blocks"}, {""})
    for row in found.packed:
        assert row.served_bytes == row.packed_bytes == layout_from_dict(row.layout).nbytes(2)
        assert row.limit == row.dense_bytes / row.packed_bytes > 7
    dense = sum(stored.nbytes for stored in read_index(folder / "dense").values())
    packed = sum(stored.nbytes for stored in read_index(folder / "packed").values())
    embeddings = 128 * 64 * 2
    assert found.token_bytes == (dense - embeddings, packed - embeddings)
    assert found.limit == (dense - embeddings) / (packed - embeddings)
    assert 1 < found.limit < min(row.limit for row in found.packed)


@pytest.mark.usefixtures("gpu")
def test_2_of_4_on_a_gpu_reads_nine_sixteenths(tmp_path: Path) -> None:
    found = explain(save_packed(tmp_path, **WHOLE) / "packed", CUDA)
    assert only(found) == ({"fragments"}, {""})
    assert {row.limit for row in found.packed} == {16 / 9}
    # Fragments are padded to 16 rows and 256 columns, and the limit counts that.
    narrow = explain(save_packed(tmp_path / "narrow", **SIZES) / "packed", CUDA)
    assert {row.limit for row in narrow.packed if row.layout["shape"] == [64, 320]} == {16 / 9 * 320 / 512}


@pytest.mark.usefixtures("gpu")
def test_what_keeps_a_gpu_from_the_fastest_form_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_packed(tmp_path, **WHOLE) / "packed"
    monkeypatch.setattr(forms.nm_linear, "supported", lambda device: "mma.sp needs 8.0 or higher")
    found = explain(folder, CUDA)
    assert only(found) == ({"portable"}, {"mma.sp needs 8.0 or higher"})
    assert {row.limit for row in found.packed} == {16 / 9}
    wide = explain(save_packed(tmp_path / "wide", dtype=torch.float32, **WHOLE) / "packed", CUDA)
    forms_found, (reason,) = only(wide)
    assert forms_found == {"dense"}
    assert reason == "the kernels support bfloat16 and float16, not float32"


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_packed(tmp_path) / "packed"
    monkeypatch.setattr(Stored, "__getitem__", lambda *_: pytest.fail("a weight was read"))
    assert len(explain(folder, CPU).packed) == 14


def test_matrices_that_stay_dense_have_a_reason(tmp_path: Path) -> None:
    packed = {row.name: row.reason for row in explain(save_packed(tmp_path) / "packed", CPU).dense}
    assert packed == {
        "lm_head.weight": "the LM head is never pruned",
        "model.embed_tokens.weight": "embeddings are looked up, not multiplied",
    }
    found = explain(tiny_models.save(tiny_models.build("mixtral"), tmp_path / "mixtral"), CPU)
    reasons = {row.name: row.reason for row in found.dense}
    assert found.packed == ()
    assert "is not packed" in reasons["model.layers.0.self_attn.q_proj.weight"]
    assert "multiplied like any other number" in reasons["model.layers.0.self_attn.q_proj.weight"]


def test_embeddings_that_are_the_head_are_read_by_every_token(tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.build("llama-tied"), tmp_path)
    whole = sum(stored.nbytes for stored in read_index(folder).values())
    assert explain(folder, CPU).token_bytes == (whole, whole)


def test_gains_are_those_of_this_device(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, "block", "0.9@16x16", **SIZES) / "packed"
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    name = "model.layers.1.mlp.up_proj"
    comparisons = [{"tokens": 1, "ratio": 1.5}, {"tokens": 256, "ratio": 0.75}]
    products = [{"layouts": {name: modules[name]}, "comparisons": comparisons}]
    write_result(folder / BENCH_NAME, {"device": "another", "finished": "then", "products": products})
    assert explain(folder, CPU).measured is None
    assert "measured not yet: run `llmprune bench`" in " ".join(run(folder).stdout.split())
    write_result(folder / BENCH_NAME, {"device": device_name(CPU), "finished": "now", "products": products})
    found = explain(folder, CPU)
    assert found.measured == "now"
    assert {row.name: row.gains for row in found.packed if row.gains} == {name: ((1, 1.5), (256, 0.75))}
    shown = run(folder, "--device", "cpu").stdout
    assert "1.50 at 1" in shown
    assert "0.75 at 256" in shown


def test_the_table_joins_equal_layers_and_explains_in_footnotes(tmp_path: Path, no_compiler: None) -> None:
    folder = save_packed(tmp_path, num_hidden_layers=3, **SIZES) / "packed"
    lines = run(folder).stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert sum("model.layers.0-2" in line for line in lines) == 1
    (row,) = [line.split() for line in lines if "mlp.down_proj" in line]
    assert row == ["mlp.down_proj", "64x320", "2:4", "dense", "[1]", "56.2%", "1.00", "none"]
    assert f"[1] {NO_COMPILER}" in lines
    assert any(line.startswith("max speed-up") and "1.00x in decode" in line for line in lines)


def test_json_holds_every_matrix(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, "block", "0.9@16x16", **SIZES) / "packed"
    content = json.loads(run(folder, "--json").stdout)
    assert len(content["packed"]) == 14
    assert content["limit"] == explain(folder, CPU).limit
    row = content["packed"][0]
    assert {"name", "layout", "form", "refused", "dense_bytes", "packed_bytes", "limit", "gains"} <= set(row)


def test_mistakes_are_explained(tmp_path: Path) -> None:
    assert "no folder" in run(tmp_path / "nothing").stderr
    folder = save_packed(tmp_path) / "packed"
    assert "CUDA devices are visible" in run(folder, "--device", "cuda:7").stderr
    (folder / BENCH_NAME).write_text("{}")
    damaged = run(folder, "--json")
    assert damaged.exit_code == 1
    assert json.loads(damaged.stdout)["error"]["kind"] == "CheckpointError"


def test_vllm_keeps_blocks_packed_that_are_dense_elsewhere(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, "block", "0.5@16x16", **SIZES) / "packed"
    found = explain(folder, CPU)
    assert {(row.form, row.vllm) for row in found.packed} == {("dense", "blocks")}
    assert {row["vllm"] for row in found.to_dict()["packed"]} == {"blocks"}
    shown = run(folder, "--device", "cpu").stdout
    assert "vLLM: blocks" in shown
    assert re.search(r"in vLLM +14 blocks *\n", shown)


def test_a_gpu_runs_the_same_kernels_in_vllm(tmp_path: Path, gpu: None) -> None:
    found = explain(save_packed(tmp_path, "nm", "2:4", **WHOLE) / "packed", CUDA)
    assert {(row.form, row.vllm) for row in found.packed} == {("fragments", "fragments")}


def test_uneven_layers_are_refused_by_vllm(tmp_path: Path) -> None:
    save_uneven(tmp_path)
    assert explain(tmp_path, CPU).uneven
    assert "in vLLM" in (shown := run(tmp_path, "--device", "cpu").stdout)
    assert "refused: decoder layers differ" in shown
