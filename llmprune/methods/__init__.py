"""The pruning methods: one file each, listed in one literal table. They know neither models nor files."""

from llmprune.methods.magnitude import Magnitude
from llmprune.methods.method import Method, Pruned
from llmprune.methods.random import Random
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "random": Random,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}

__all__ = ["METHODS", "Magnitude", "Method", "Pruned", "Random", "SparseGPT", "Wanda"]
