"""What the dry run says about options of the statistics: corrected targets, the order in a layer, weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, recipe, save
from torch.utils.flop_counter import FlopCounterMode

from llmprune import dry_run, prune
from llmprune.methods.correction import correction_bytes
from llmprune.progress import Progress
from llmprune.pruning.forecast.forecast import measure_rates
from llmprune.pruning.forecast.plan import Around, Work
from llmprune.pruning.layers import LayerDriver, PrunedLayers

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
    # To observe the dense layers, without held-back rows, and to advance.
    assert corrected.forward - plain.forward == 2 * 2 * (ATTENTION + MLP) * (tokens + SAMPLES * LENGTH)
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


def test_what_the_order_within_a_layer_takes_is_what_torch_counts(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in turn and one at once, which differ in nothing but forward passes; with the dense layer's beside."""
    drive, counter = LayerDriver.drive, FlopCounterMode(display=False)

    def count(driver: LayerDriver) -> PrunedLayers:
        with counter:
            return drive(driver)

    monkeypatch.setattr(LayerDriver, "drive", count)
    planned, counted = [], []
    for sequential in (False, True):
        settings = correcting(batch_size=4, statistics={"alpha": 0.5, "sequential": sequential})
        planned.append(dry_run(llama, settings).work)
        prune(llama, settings, tmp_path / str(sequential))
        operations = counter.get_flop_counts()["Global"]
        counted.append(sum(operations.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)))
    once, turns = planned
    # At once, the forecast counts the last product, before which passes end after their first batch of four.
    last = 2 * 2 * (MLP // 3) * ((SAMPLES + HELD_BACK - 4) + (SAMPLES - 4)) * LENGTH
    assert turns.forward - (once.forward - last) == pytest.approx(counted[1] - counted[0], rel=1e-3)
    assert (turns.gram, turns.solve) == (once.gram, once.solve)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_weights_by_the_loss_take_a_second_gram(llama: Path, alpha: float) -> None:
    plain, weighted = (
        dry_run(llama, correcting(statistics={"alpha": alpha, "loss_weight": kind})) for kind in ("none", "tokens")
    )
    assert weighted.work.gram == 2 * plain.work.gram
    assert weighted.seconds.gram == 2 * plain.seconds.gram


def test_quantising_after_a_fit_takes_plain_products_once_more(llama: Path) -> None:
    extra = {"quantise": {"bits": 8}, "reconstruct": {"epochs": 1}}
    plain, whole = (
        dry_run(llama, correcting(statistics={"alpha": 0.5, "loss_weight": "tokens"}, **more)).work.gram
        for more in ({}, extra)
    )
    assert whole == plain * 5 / 4


def test_experts_have_only_plain_products(tmp_path: Path) -> None:
    """They read other tokens in both models, and in an order of their own."""
    source = save(build("mixtral"), tmp_path / "dense")
    plain, weighted = (
        dry_run(source, correcting(0.0, include=["*experts*"], statistics={"loss_weight": kind})).work.gram
        for kind in ("none", "tokens")
    )
    assert weighted == plain > 0


class SharesKnown(Exception):
    """Ends a run that has said what its stages cost."""


@pytest.mark.parametrize("more", [{"alpha": 0.5}, {"sequential": True}])
def test_the_time_left_begins_with_the_passes_on_top(llama: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    def pruning_share(**statistics: Any) -> float:
        def watch(progress: Progress) -> None:
            if progress.shares:
                raise SharesKnown(progress.shares["pruning"])

        with pytest.raises(SharesKnown) as known:
            prune(llama, recipe(statistics=statistics), tmp_path / "out", watch=watch)
        return float(known.value.args[0])

    assert pruning_share(**more) > 1.2 * pruning_share()
