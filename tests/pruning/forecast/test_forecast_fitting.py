"""What the dry run says about fitting layers as a whole, beside a run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import build, recipe, save
from torch.utils.flop_counter import FlopCounterMode

from llmprune import dry_run, prune
from llmprune.cli.tables.pruning import dry_run_tables
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pruning import fitting as fit
from llmprune.pruning.forecast.memory import LayerMemory, pruning_needs
from llmprune.pruning.forecast.plan import Around, Work
from llmprune.pruning.forecast.rates import measure_rates
from llmprune.recipe.recipe import load_recipe
from llmprune.stream.stream import StreamSettings
from llmprune.text.tokens import Tokens

LENGTH, TRAINING, VALIDATION = 24, 6, 2


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_rates.__name__ == "measure_rates"
    monkeypatch.setattr("llmprune.pruning.forecast.forecast.measure_rates", lambda *_: Work(1e9, 2e9, 3e9, 1e9))
    monkeypatch.setattr("llmprune.pruning.forecast.forecast.measure_around", lambda *_: Around())


def fitting(**changes: Any) -> dict[str, Any]:
    reconstruct = {"epochs": 2, "lr": 1e-3, **changes.pop("reconstruct", {})}
    return recipe(**{"method": "wanda", "held_back": VALIDATION, "reconstruct": reconstruct, **changes})


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"reconstruct": {"target": "local"}}),
        ("llama", {"reconstruct": {"target": "dense"}}),
        ("llama", {"batch_size": 8, "exclude": ["*.1.mlp.*"], "activation_budget": 0}),
        ("mixtral", {"reconstruct": {"train": ["norms"]}}),
        ("gpt2", {}),
    ],
)
def test_the_predicted_peak_is_that_of_the_run(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = save(build(family), tmp_path / "dense")
    plan = dry_run(source, fitting(**changes))
    report = prune(source, fitting(**changes), tmp_path / "out")
    assert plan.memory.layer.matching > 0
    assert plan.memory.peak == pytest.approx(report.header["memory"]["predicted_bytes"], rel=0.01)


@pytest.mark.parametrize(("family", "window"), [("llama", "layer"), ("mixtral", "layer"), ("llama", "attention+mlp")])
def test_operations_are_those_that_a_run_counts(
    family: str, window: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch counts attention as well, which the forecast leaves out."""
    source = save(build(family), tmp_path / "dense")
    settings = fitting(batch_size=6)
    settings["reconstruct"]["window"] = window
    plan = dry_run(source, settings)
    counted = []
    match_layer = fit.match_layer

    def count(*arguments: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            matched = match_layer(*arguments)
        assert matched.epochs == 2, "two epochs without improvement are needed to stop"
        counted.append(counter.get_total_flops())
        return matched

    monkeypatch.setattr(fit, "match_layer", count)
    prune(source, settings, tmp_path / "out")
    without = dry_run(source, {**settings, "reconstruct": None})
    assert without.work.matching == 0
    # One pass of the dense layer is outside of it: half of the two that pruning takes.
    assert plan.work.matching - without.work.forward / 2 == pytest.approx(sum(counted), rel=0.25)
    assert plan.seconds.matching == plan.work.matching / 1e9
    assert plan.work.total == without.work.total + plan.work.matching


def test_operations_of_a_dense_model(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    elements = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    one, three = (dry_run(source, fitting(reconstruct={"epochs": epochs})).work.matching for epochs in (1, 3))
    epoch = 6 * elements * TRAINING * LENGTH + 2 * elements * VALIDATION * LENGTH
    assert three - one == 2 * 2 * epoch
    assert one == 2 * (epoch + 2 * elements * VALIDATION * LENGTH + 2 * elements * (TRAINING + VALIDATION) * LENGTH)


def test_parts_fitted_in_turn_take_less_memory_and_more_work(tmp_path: Path) -> None:
    """An attention of 3,072 elements runs once more for its own fit; the other 4,608, and norms, are trained then.

    The whole layer is validated before, and everything is kept as it was.
    """
    source = save(build("llama"), tmp_path / "dense")
    plans = [
        dry_run(source, fitting(reconstruct={"window": window, "train": ["weights"]}))
        for window in ("layer", "attention+mlp")
    ]
    validation = 2 * 2 * 7680 * VALIDATION * LENGTH
    assert plans[1].work.matching == pytest.approx(plans[0].work.matching * (1 + 3072 / 7680) + validation)
    saved = plans[0].memory.layer.matching - plans[1].memory.layer.matching
    assert saved == 3072 * (21 + 4) - 7680 * 4
    assert plans[1].memory.hidden_states == 1.5 * plans[0].memory.hidden_states


def test_layers_that_are_excluded_are_not_fitted(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    whole, half = (dry_run(source, fitting(exclude=exclude)) for exclude in ([], ["*.1.*"]))
    followed = 2 * 7680 * (TRAINING + VALIDATION) * LENGTH
    assert half.work.matching == whole.work.matching / 2 + followed
    excluded = next(plan for plan in half.layers if plan.indices == (1,))
    assert excluded.memory.matching == 0
    assert excluded.work.matching == followed


def test_a_layer_in_float16_is_fitted_with_the_memory_of_float32(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    needs = {
        dtype: dry_run(source, fitting(compute_dtype=dtype)).memory.layer.matching
        for dtype in ("float32", "float16", "bfloat16")
    }
    assert needs["float16"] == needs["float32"] > needs["bfloat16"]


def test_every_set_of_hidden_states_has_a_budget_of_its_own(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    whole = (TRAINING + VALIDATION) * LENGTH * 32 * 4
    for budget in (10**9, 1000):
        for target, sets in (("local", 2), ("corrected", 2), ("dense", 3)):
            plan = dry_run(source, fitting(reconstruct={"target": target}, activation_budget=budget))
            assert plan.memory.hidden_states == sets * min(whole, budget)
            assert plan.spilled_bytes == sets * (whole - min(whole, budget))


def test_fitting_takes_the_place_of_statistics_and_solver() -> None:
    """They are freed before it begins."""
    small, large = (LayerMemory(10, 40, 20, 5, 30, matching=matching) for matching in (1, 200))
    assert (small.total, large.total) == (10 + 40 + 20 + 30, 10 + 200)


def test_the_tables_have_lines_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(build("llama"), tmp_path / "dense")
    Console(width=80).print(*dry_run_tables(dry_run(source, fitting())))
    shown = capsys.readouterr().out
    assert shown.count("block matching") == 2
    assert "some stop earlier" in shown
    Console(width=80).print(*dry_run_tables(dry_run(source, {**fitting(), "reconstruct": None})))
    assert "block matching" not in capsys.readouterr().out


def test_only_kept_layers_are_fitted(tmp_path: Path) -> None:
    """Every layer of the dense model still runs once for what the kept ones should return."""
    source = save(build("llama", num_hidden_layers=4), tmp_path / "dense")
    depth = {"pattern": None, "method": None, "structures": {"depth": {"remove": 1}}}
    elements = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    one, three = (dry_run(source, fitting(reconstruct={"epochs": n}, **depth)).work.matching for n in (1, 3))
    epoch = 6 * elements * TRAINING * LENGTH + 2 * elements * VALIDATION * LENGTH
    assert three - one == 3 * 2 * epoch
    first = 3 * 2 * elements * VALIDATION * LENGTH
    assert one == 3 * epoch + first + 4 * 2 * elements * (TRAINING + VALIDATION) * LENGTH


def test_the_need_counts_the_fit_of_layers_that_only_lose_structures(tmp_path: Path) -> None:
    source = CheckpointSource(save(build("llama"), tmp_path / "dense"))
    texts = {"calibration": Tokens(torch.zeros(8, LENGTH, dtype=torch.long), "", {})}
    structures = {"ffn": {"remove": 0.25, "multiple": 1}}
    wanted = load_recipe(fitting(pattern=None, method=None, reconstruct={"train": ["weights"]}, structures=structures))
    needs = pruning_needs(source, [{}, {}], texts, StreamSettings(torch.device("meta"), batch_size=1), wanted)
    said = re.match(r"up to ([\d.]+) kB for pruning", needs)
    assert said is not None
    elements = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    assert float(said[1]) * 1000 > (21 + 4) * elements
