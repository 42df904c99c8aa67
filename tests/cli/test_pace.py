"""How much time is left, in a stage and in a run, by a clock that the tests turn."""

import pytest

from llmprune.cli.pace import Pace, RunPace
from llmprune.progress import Progress

SHARES = {"sampling text": 10.0, "dense perplexity": 1.0, "pruning": 4.0, "pruned perplexity": 1.0}


def test_pace_waits_for_a_finished_layer_and_counts_down() -> None:
    pace = Pace()
    assert pace.update(Progress("pruning", 0, 4, "statistics"), 0.0) is None
    assert pace.left(5.0) is None
    assert pace.update(Progress("pruning", 0, 4, "writing"), 9.0) is None
    assert pace.update(Progress("pruning", 1, 4, "statistics"), 10.0) == 10
    assert pace.left(10.0) == 30
    assert pace.left(14.0) == 26
    assert pace.left(99.0) == 0
    assert pace.update(Progress("pruning", 2, 4, "statistics"), 16.0) == 6
    assert pace.left(16.0) == 16
    assert pace.update(Progress("pruning", 4, 4), 20.0) == 4
    assert pace.left(20.0) is None


def test_pace_starts_again_with_every_stage() -> None:
    pace = Pace()
    pace.update(Progress("dense perplexity", 0, 2), 0.0)
    pace.update(Progress("dense perplexity", 1, 2), 1.0)
    pace.update(Progress("pruning", 0, 2), 2.0)
    assert pace.left(2.0) is None


def test_pace_does_not_count_replayed_layers() -> None:
    pace = Pace()
    pace.update(Progress("pruning", 0, 3, "replaying"), 0.0)
    pace.update(Progress("pruning", 0, 3, "advancing"), 0.1)
    pace.update(Progress("pruning", 1, 3, "statistics"), 0.2)
    assert pace.left(0.2) is None
    pace.update(Progress("pruning", 2, 3, "statistics"), 10.2)
    assert pace.left(10.2) == 10


def test_a_run_without_shares_knows_the_stage_only() -> None:
    pace = RunPace()
    pace.update(Progress("pruning", 0, 4), 0.0)
    pace.update(Progress("pruning", 1, 4), 10.0)
    assert pace.left(10.0) == 30


def test_the_stages_ahead_are_part_of_what_is_left() -> None:
    pace = RunPace()
    pace.update(Progress("calibration text", shares=SHARES), 0.0)
    pace.update(Progress("sampling text", 0, 10, unit="token"), 0.0)
    assert pace.left(1.0) is None
    pace.update(Progress("sampling text", 5, 10, unit="token"), 50.0)
    # Half of its share took 50 s: 50 s more, and 10 s for each of the 6 units ahead.
    assert pace.left(50.0) == pytest.approx(50 + 60)
    pace.update(Progress("sampling text", 10, 10, unit="token"), 100.0)
    pace.update(Progress("dense perplexity", 0, 2), 100.0)
    pace.update(Progress("dense perplexity", 1, 2), 101.0)
    # Sampling says nothing about the rest once a forward pass was measured: 2 s for a unit.
    assert pace.left(101.0) == pytest.approx(1 + 5 * 2)
    pace.update(Progress("dense perplexity", 2, 2), 102.0)
    pace.update(Progress("pruning", 0, 4, "statistics"), 102.0)
    assert pace.left(103.0) == pytest.approx(7 + 2)
    pace.update(Progress("pruning", 4, 4), 118.0)
    # Five units took 18 s.
    assert pace.left(118.0) == pytest.approx(18 / 5)
    pace.update(Progress("pruned perplexity", 2, 2), 122.0)
    assert pace.left(122.0) == 0


def test_a_stage_that_was_left_out_is_not_waited_for() -> None:
    pace = RunPace()
    pace.update(Progress("calibration text", shares=SHARES), 0.0)
    pace.update(Progress("pruning", 0, 4), 0.0)
    pace.update(Progress("pruning", 2, 4), 8.0)
    assert pace.left(8.0) == pytest.approx(8 + 4)
