"""The rules by which masks change while a model trains: one file each, listed in a literal table."""

from typing import Any

from llmprune.training.rules.before import SNIP, GraSP
from llmprune.training.rules.lottery import Lottery
from llmprune.training.rules.magnitude import GradualMagnitude
from llmprune.training.rules.movement import Movement, SoftMovement
from llmprune.training.rules.rigl import RigL
from llmprune.training.rules.rule import Rule, Selection
from llmprune.training.rules.schedule import Schedule
from llmprune.training.rules.sr_ste import SRSTE

RULES: dict[str, Any] = {
    "magnitude": GradualMagnitude,
    "movement": Movement,
    "soft-movement": SoftMovement,
    "rigl": RigL,
    "sr-ste": SRSTE,
    "lottery": Lottery,
    "snip": SNIP,
    "grasp": GraSP,
}

__all__ = [
    "RULES", "SNIP", "SRSTE", "GraSP", "GradualMagnitude", "Lottery", "Movement", "RigL", "Rule", "Schedule",
    "Selection", "SoftMovement",
]  # fmt: skip
