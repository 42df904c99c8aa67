"""The pruning methods: one file each, listed in literal tables. They know neither models nor files.

A method chooses which weights are removed; steps improve its result. Recipes chain them: [wanda, swaps, refit].
"""

from llmprune.methods.admm import ADMM
from llmprune.methods.alps import ALPS
from llmprune.methods.block_obs import BlockOBS
from llmprune.methods.gradients import Fisher, Gradient, Taylor, gradient_kind, lacks_gradient, with_gradient
from llmprune.methods.magnitude import Magnitude
from llmprune.methods.method import Method, Pruned, check_pattern
from llmprune.methods.random import Random
from llmprune.methods.refit import Refit
from llmprune.methods.ria import RIA
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.methods.step import Chain, Step
from llmprune.methods.swaps import Swaps
from llmprune.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "random": Random,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "gradient": Gradient,
    "taylor": Taylor,
    "fisher": Fisher,
    "sparsegpt": SparseGPT,
    "obs": BlockOBS,
    "admm": ADMM,
    "alps": ALPS,
}

STEPS: dict[str, type[Step]] = {
    "swaps": Swaps,
    "refit": Refit,
}


def method_name(method: Method) -> str:
    """What reports call a method: its name in recipes, and the names of a chain's steps after it."""
    if isinstance(method, Chain):
        return " + ".join([method_name(method.method), *(name for name, _ in method.steps)])
    return next(name for name, kind in METHODS.items() if type(method) is kind)


__all__ = [
    "ADMM", "ALPS", "METHODS", "RIA", "STEPS", "BlockOBS", "Chain", "Fisher", "Gradient", "Magnitude", "Method",
    "Pruned", "Random", "Refit", "SparseGPT", "Step", "Swaps", "Taylor", "Wanda", "check_pattern", "gradient_kind",
    "lacks_gradient", "method_name", "with_gradient",
]  # fmt: skip
