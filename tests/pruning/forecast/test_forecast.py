import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from folders import contents, tensors, zeros

from llmprune import prune
from llmprune.cli.tables.pruning import dry_run_tables
from llmprune.devices import describe_device
from llmprune.errors import DeviceError, PatternError, RecipeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.progress import Progress
from llmprune.pruning.forecast.forecast import dry_run
from llmprune.pruning.forecast.plan import Around, DryRun, Work
from llmprune.pruning.forecast.rates import measure_rates
from llmprune.units import format_size

# Of the recipe of tiny_models: 6 samples and one held back, 24 tokens each.
COUNTED, TOKENS = 6 * 24, 7 * 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, hidden size 32, MLP 48, keys and values 16 wide."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of two layers, hidden size 32, four experts of width 48, two for each token."""
    return tiny_models.save(tiny_models.build("mixtral"), tmp_path_factory.mktemp("mixtral"))


RATES = Work(forward=1e9, gram=2e9, solve=3e9)
AROUND = Around(sampling=5.0, evaluation=7.0)


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.pruning.forecast.forecast.measure_rates", lambda device, dtype: RATES)
    monkeypatch.setattr("llmprune.pruning.forecast.forecast.measure_around", lambda *arguments: AROUND)


def look(folder: Path, **changes: Any) -> DryRun:
    return dry_run(folder, tiny_models.recipe(**changes))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"calibration": {"samples": 3, "length": 64}, "batch_size": 8, "held_back": 0}),
        ("mistral", {"method": "wanda"}),
        ("mistral", {"batch_size": 4, "held_back": 3}),
        ("mistral", {"batch_size": 16}),
        ("gemma3n", {}),
        ("gpt2", {"method": "magnitude"}),
        ("llama", {"activation_budget": 0}),
        ("llama", {"pattern": "2:4", "exclude": ["*.1.mlp.*"]}),
    ],
)
def test_zeros_and_memory_are_those_of_the_run(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build(family), tmp_path / "source")
    recipe = tiny_models.recipe(**changes)
    plan = dry_run(source, recipe)
    report = prune(source, recipe, tmp_path / "out")
    planned = {
        f"{plan.layers_path}.{index}.{matrix.name}": (matrix.shape, matrix.pattern, matrix.method, matrix.zeros)
        for layer in plan.layers
        for index in layer.indices
        for matrix in layer.matrices
        if matrix.method is not None
    }
    assert planned == {row.name: (row.shape, row.pattern, row.method, row.zeros) for row in report.rows}
    assert plan.memory.peak == report.header["memory"]["predicted_bytes"]
    assert plan.sparsity == pytest.approx(report.sparsity)
    assert plan.disk_bytes == sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    assert plan.recipe == report.header["recipe"]
    assert plan.device == report.header["device"] == describe_device(torch.device("cpu"))


def test_zeros_under_a_sparsity_that_does_not_divide(folder: Path, tmp_path: Path) -> None:
    plan = look(folder, pattern="0.37/row", method="wanda")
    prune(folder, tiny_models.recipe(pattern="0.37/row", method="wanda"), tmp_path / "out")
    pruned = tensors(tmp_path / "out")
    for matrix in plan.layers[0].matrices:
        assert matrix.zeros == zeros(pruned[f"model.layers.1.{matrix.name}.weight"])


def test_equal_layers_stand_together(folder: Path) -> None:
    assert [layer.indices for layer in look(folder).layers] == [(0, 1)]
    apart = look(folder, rules=[{"match": "*.layers.1.mlp.*", "pattern": "2:4"}])
    assert [layer.indices for layer in apart.layers] == [(0,), (1,)]
    assert {m.name: m.pattern for m in apart.layers[1].matrices if m.name.startswith("mlp")} == {
        "mlp.gate_proj": "2:4",
        "mlp.up_proj": "2:4",
        "mlp.down_proj": "2:4",
    }


def test_layers_of_another_structure_stand_apart(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("qwen3_moe"), tmp_path)
    plan = look(source)
    assert [layer.indices for layer in plan.layers] == [(0,), (1, 2)]
    assert not any(".experts." in matrix.name for matrix in plan.layers[0].matrices)
    assert sum(".experts." in matrix.name for matrix in plan.layers[1].matrices) == 12


def test_it_says_what_it_is_doing(folder: Path) -> None:
    steps: list[Progress] = []
    dry_run(folder, tiny_models.recipe(exclude=["*.0.*"]), watch=steps.append)
    told = [(step.stage, step.layer, step.layers) for step in steps]
    layers = [("planning the layers", number, 2) for number in (0, 1)]
    assert told == [("opening the model", 0, 1), *layers, ("timing this machine", 0, 1)]


def test_matrices_without_a_job_are_listed_as_dense(folder: Path) -> None:
    plan = look(folder, exclude=["*.k_proj"])
    kept = {matrix.name: (matrix.pattern, matrix.method, matrix.zeros) for matrix in plan.layers[0].matrices}
    assert kept["self_attn.k_proj"] == ("dense", None, 0)
    assert len(kept) == 7
    # They are computed all the same, and their inputs are the others'.
    assert plan.work.forward == look(folder).work.forward
    assert plan.work.gram == look(folder).work.gram


def test_operations_of_a_dense_model(folder: Path) -> None:
    plan = look(folder)
    attention, mlp = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48
    assert plan.tokens == TOKENS
    assert plan.work.forward == 2 * 2 * 2 * TOKENS * (attention + mlp)
    # One Gram each for q, k and v; o; gate and up; down.
    widths = (32, 32, 32, 48)
    assert plan.work.gram == 2 * sum(2 * COUNTED * width**2 for width in widths)
    outputs = {32: 32 + 16 + 16 + 32 + 48 + 48, 48: 32}
    sweeps = sum(2 * rows * width**2 for width, rows in outputs.items())
    assert plan.work.solve == pytest.approx(2 * (sum(width**3 / 3 for width in widths) + sweeps))
    assert plan.work.total == plan.work.forward + plan.work.gram + plan.work.solve


def test_every_token_reaches_two_of_four_experts(experts: Path) -> None:
    plan = look(experts)
    attention, expert = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48
    assert plan.work.forward == pytest.approx(2 * 2 * 2 * TOKENS * (attention + 2 * expert))
    assert plan.work.gram == pytest.approx(2 * 2 * COUNTED * (2 * 32**2 + 2 * (32**2 + 48**2)))


def test_experts_are_shared_out_without_statistics_and_where_some_stay_dense(experts: Path) -> None:
    expected = look(experts).work.forward
    assert look(experts, method="magnitude").work.forward == pytest.approx(expected)
    assert look(experts, exclude=["*.down_proj"]).work.forward == pytest.approx(expected)


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda"])
def test_only_regression_forms_and_solves_grams(folder: Path, method: str) -> None:
    work = look(folder, method=method).work
    assert work.gram == work.solve == 0
    assert work.forward == look(folder).work.forward


def test_hidden_states_beyond_the_budget_go_to_disk(folder: Path) -> None:
    total = TOKENS * 32 * 4
    within, without = look(folder), look(folder, activation_budget=0)
    assert (within.memory.hidden_states, within.spilled_bytes) == (total, 0)
    assert (without.memory.hidden_states, without.spilled_bytes) == (0, total)


def test_one_layer_of_each_kind_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = CheckpointSource.load_layer

    def load_layer(self: CheckpointSource, index: int, device: torch.device) -> None:
        loaded.append(index)
        original(self, index, device)

    monkeypatch.setattr(CheckpointSource, "load_layer", load_layer)
    look(folder)
    assert set(loaded) == {0}


def test_nothing_is_written_and_no_text_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(folder)
    plan = look(folder, calibration={"source": "nobody/corpus", "samples": 6, "length": 24})
    assert contents(tmp_path) == {}
    assert contents(folder) == before
    assert any("does not read the calibration text" in note for note in plan.notes)


def test_the_dense_model_is_loaded_in_the_dtype_of_the_computation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = format_size(4 * sum(tensor.numel() for tensor in tiny_models.build("llama").parameters()))
    stored = tiny_models.save(tiny_models.build("llama", torch.bfloat16), tmp_path / "stored")
    assert f"loaded: {size}." in " ".join(look(stored, compute_dtype="float32").notes)
    monkeypatch.setattr("llmprune.text.loading.free_bytes", lambda device: 1000)
    assert f"loaded: {size}, more than fits: parts of it are loaded again" in " ".join(look(folder).notes)


def test_notes_say_what_the_figures_leave_out(folder: Path) -> None:
    def notes(**changes: Any) -> str:
        return " ".join(look(folder, **changes).notes)

    text = {"source": "nobody/corpus", "samples": 6, "length": 24}
    assert "lower bound" in notes()
    assert "self-generated text" in notes()
    assert "self-generated text" not in notes(calibration=text)
    assert "average" in notes(rules=[{"match": "*mlp*", "pattern": "0.5/layer"}])
    assert "average" not in notes()


def test_seconds_are_operations_at_the_measured_rates(folder: Path) -> None:
    plan = look(folder)
    assert plan.rates == RATES
    assert plan.seconds == Work(plan.work.forward / 1e9, plan.work.gram / 2e9, plan.work.solve / 3e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rates_are_plausible(dtype: torch.dtype) -> None:
    rates = measure_rates(torch.device("cpu"), dtype)
    assert all(1e8 < rate < 1e15 for rate in (rates.forward, rates.gram, rates.solve))


def test_to_dict_is_json_and_complete(folder: Path) -> None:
    plan = look(folder)
    content = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert content["layers"][0]["indices"] == [0, 1]
    assert content["layers"][0]["matrices"][0] == {
        "name": "self_attn.q_proj",
        "shape": [32, 32],
        "pattern": "0.5",
        "method": "sparsegpt",
        "zeros": 512,
    }
    assert content["memory"]["peak"] == plan.memory.peak
    assert content["work"] == {
        "forward": plan.work.forward,
        "gram": plan.work.gram,
        "solve": plan.work.solve,
        "matching": 0.0,
    }
    assert content["seconds"]["forward"] == plan.seconds.forward
    assert (content["seconds"]["sampling"], content["seconds"]["evaluation"]) == (5.0, 7.0)
    assert content["seconds"]["total"] == plan.total_seconds == plan.seconds.total + 12.0
    assert content["compute_dtype"] == "float32"


def test_compute_dtype_is_the_recipes(folder: Path) -> None:
    plan = look(folder, compute_dtype="bfloat16")
    assert plan.compute_dtype == "bfloat16"
    assert plan.layers[0].memory.weights * 2 == look(folder).layers[0].memory.weights
    assert plan.disk_bytes == look(folder).disk_bytes


def test_a_pattern_that_does_not_fit_names_the_matrix(folder: Path) -> None:
    with pytest.raises(PatternError, match=r"model\.layers\.0\.self_attn\.q_proj: pattern 3:7"):
        look(folder, pattern="3:7")


def test_a_glob_without_a_match_and_an_absent_device_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"exclude: '\*\.gate' matches none"):
        look(folder, exclude=["*.gate"])
    with pytest.raises(DeviceError, match="cuda:99"):
        look(folder, device="cuda:99")


def test_tables_join_the_experts_and_fit_80_columns(experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=80).print(*dry_run_tables(look(experts)))
    shown = capsys.readouterr().out
    assert "model.layers.0-1" in shown
    assert "mlp.experts.0-3.down_proj" in shown
    assert "predicted peak" in shown
    assert "sampling text" in shown
    assert "perplexity" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
