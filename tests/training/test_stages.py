"""When stages begin and end."""

import pytest

from llmprune.errors import TrainingError
from llmprune.training.rules import GradualMagnitude, Lottery, Movement, Schedule
from llmprune.training.stages import Plan


def laid_out(plan: Plan) -> list[tuple[int, float, int, int]]:
    return [(stage.number, round(stage.sparsity, 3), stage.begin, stage.end) for stage in plan.stages]


def test_stages_follow_each_other() -> None:
    plan = Plan.of(Schedule("linear", stages=2, end=0.5), GradualMagnitude(), 10)
    assert laid_out(plan) == [(1, 0.25, 0, 10), (2, 0.5, 10, 20)]
    assert [plan.at(step).number for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 2, 2, 2, 2]
    assert plan.steps == 20


def test_a_dense_stage_comes_first_where_the_rule_needs_one() -> None:
    schedule = Schedule("one-shot", stages=1, end=0.5)
    assert laid_out(Plan.of(schedule, Movement(), 10)) == [(0, 0.0, 0, 10), (1, 0.5, 10, 20)]
    assert Plan.of(Schedule("one-shot", 1, end=0.5, dense=0), Movement(), 10).steps == 10
    assert Plan.of(Schedule("one-shot", 1, end=0.5, dense=7), GradualMagnitude(), 10).stages[0].end == 7


def test_a_lottery_trains_from_the_step_to_which_it_rewinds() -> None:
    plan = Plan.of(Schedule("iterative", stages=2, end=0.75), Lottery(rewind=3), 10)
    assert laid_out(plan) == [(0, 0.0, 0, 10), (1, 0.5, 10, 17), (2, 0.75, 17, 24)]
    assert [stage.skipped for stage in plan.stages] == [0, 3, 3]
    for keys in ({"dense": 0}, {"dense": 3}):
        with pytest.raises(TrainingError, match="rewinds to step 3"):
            Plan.of(Schedule(end=0.5, **keys), Lottery(rewind=3), 10)
    with pytest.raises(TrainingError, match="rewinds to step 10"):
        Plan.of(Schedule(end=0.5, dense=50), Lottery(rewind=10), 10)
