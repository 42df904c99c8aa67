"""What the dry run says about corrected targets."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, recipe, save

from llmprune import dry_run, prune
from llmprune.methods.correction import correction_bytes
from llmprune.pruning.forecast.forecast import measure_rates
from llmprune.pruning.forecast.plan import Around, Work

SAMPLES, HELD_BACK, LENGTH = 6, 2, 24
ATTENTION, MLP = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_rates.__name__ == "measure_rates"
    monkeypatch.setattr("llmprune.pruning.forecast.forecast.measure_rates", lambda *_: Work(1e9, 2e9, 3e9, 1e9))
    monkeypatch.setattr("llmprune.pruning.forecast.forecast.measure_around", lambda *_: Around())


def correcting(alpha: float = 0.5, **changes: Any) -> dict[str, Any]:
    return recipe(**{"held_back": HELD_BACK, "statistics": {"alpha": alpha}, **changes})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"statistics": {"alpha": 0.5, "loss_weight": "tokens"}}),
        ("llama", {"reconstruct": {"epochs": 1, "target": "local"}, "activation_budget": 0}),
        ("llama", {"exclude": ["*.1.*"]}),
        ("mixtral", {}),
    ],
)
def test_the_predicted_peak_is_that_of_the_run(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = save(build(family), tmp_path / "dense")
    plan = dry_run(source, correcting(**changes))
    report = prune(source, correcting(**changes), tmp_path / "out")
    assert plan.memory.peak == pytest.approx(report.header["memory"]["predicted_bytes"], rel=0.01)


def test_what_comes_on_top_in_memory(llama: Path) -> None:
    plain, corrected = (dry_run(llama, correcting(alpha)).memory.layer for alpha in (0.0, 0.5))
    assert corrected.weights == 2 * plain.weights
    assert corrected.statistics == 2 * plain.statistics
    assert corrected.forward - plain.forward == 2 * LENGTH * (4 * (3 * 32 + 48) + 8 * 48)
    assert 0 < corrected.solving - plain.solving <= correction_bytes((32, 48))


def test_what_comes_on_top_in_operations(llama: Path) -> None:
    plain, corrected = (dry_run(llama, correcting(alpha)).work for alpha in (0.0, 0.5))
    tokens = (SAMPLES + HELD_BACK) * LENGTH
    assert corrected.forward - plain.forward == 2 * 2 * 2 * (ATTENTION + MLP) * tokens
    assert corrected.gram == 2 * plain.gram
    targets = 4 * (ATTENTION * 32 + (MLP // 3) * (2 * 32 + 48))
    assert corrected.solve - plain.solve == 2 * targets


@pytest.mark.parametrize(("target", "sets"), [(None, 2), ("local", 3), ("corrected", 2), ("dense", 3)])
def test_every_set_of_hidden_states_is_counted(llama: Path, target: str | None, sets: int) -> None:
    whole = (SAMPLES + HELD_BACK) * LENGTH * 32 * 4
    fitted = target and {"target": target, "epochs": 1}
    for budget in (10**9, 1000):
        plan = dry_run(llama, correcting(reconstruct=fitted, activation_budget=budget))
        assert plan.memory.hidden_states == sets * min(whole, budget)
        assert plan.spilled_bytes == sets * (whole - min(whole, budget))
