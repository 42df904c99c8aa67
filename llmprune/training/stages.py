"""When the stages of a training begin, and how long each of them takes."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from llmprune.errors import TrainingError
from llmprune.training.rules import Lottery, RigL, Rule, Schedule


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        number: 0 for the dense one before the first, at least 1 for the others.
        sparsity: while it trains, in [0, 1).
        begin: the number of optimizer steps before it.
        steps: of its own.
        skipped: of its learning-rate cycle, because it begins with the weights of a later step.
    """

    number: int
    sparsity: float
    begin: int
    steps: int
    skipped: int = 0

    @property
    def end(self) -> int:
        """The number of optimizer steps after it."""
        return self.begin + self.steps


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages of a training, one after the other.

    Attributes:
        stages: at least one.
        end: sparsity of the last.
    """

    stages: tuple[Stage, ...]
    end: float

    @classmethod
    def of(cls, schedule: Schedule, rule: Rule, every: int) -> "Plan":
        """Lay out a schedule.

        Args:
            schedule: the sparsities.
            rule: one that learns scores, or rewinds, gets a dense stage unless the schedule says otherwise.
            every: optimizer steps of a stage, at least 1.

        Raises:
            TrainingError: a rule rewinds to a step that the dense stage does not reach, or is to move zeros and has no
                step to do so.
        """
        rewind = rule.rewind if isinstance(rule, Lottery) else 0
        dense = schedule.dense
        if dense is None:
            dense = every if rule.score_rate or isinstance(rule, Lottery) else 0
        if isinstance(rule, Lottery) and not rewind < min(dense, every):
            raise TrainingError(
                f"the lottery rewinds to step {rewind}, with {dense} dense steps and {every} in each stage",
                expected="a step of the dense stage, and steps after it in each stage",
                fix="lower rewind, or raise schedule.every; schedule.dense may not be 0",
            )
        stages = [Stage(0, schedule.start, 0, dense)] if dense else []
        begin = dense
        for number, sparsity in enumerate(schedule.sparsities, start=1):
            stages.append(Stage(number, sparsity, begin, every - rewind, rewind))
            begin += every - rewind
        plan = cls(tuple(stages), schedule.end)
        if isinstance(rule, RigL):
            plan._require_moves(rule)
        return plan

    def _require_moves(self, rule: RigL) -> None:
        """Refuse a plan in which no zero ever moves: what it gives is no RigL."""
        end = rule.until * self.steps
        for step in range(rule.interval, math.ceil(end), rule.interval):
            if self.at(step).sparsity and self.at(step) is self.at(step - 1):  # a stage that begins chooses by size
                return
        raise TrainingError(
            f"rigl moves no zeros: none of every {rule.interval} steps is within a stage and before step {end:g}, "
            f"{rule.until:g} of {self.steps}",
            expected="at least one move",
            fix=f"lower interval (to {max(1, min(stage.steps for stage in self.stages) // 10)}), or raise "
            "schedule.every",
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return self.stages[-1].end

    def at(self, step: int) -> Stage:
        """The stage that a step, counted from 0, belongs to; the last for those after the end."""
        return self.stages[max(0, bisect_right(self.stages, step, key=lambda stage: stage.begin) - 1)]
