"""What all tests share: shape annotations that are executed, and fixed seeds."""

import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Triton decides between its interpreter and the GPU when a kernel is defined, so before anything imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Before any test module imports these: jaxtyping's annotations are then checked at every call. As for static type
# checkers, an int will do for a float.
install_import_hook(
    [
        "llmprune.patterns",
        "llmprune.statistics",
        "llmprune.methods",
        "llmprune.storage.formats",
        # Not all of `structures`: its tracing is called for every operation, and has no shapes to check.
        "llmprune.structures.choose.scores",
        "llmprune.structures.remove.solver",
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

settings.register_profile("llmprune", derandomize=True, database=None, deadline=None)
settings.load_profile("llmprune")


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """Start every test from the same seeds, and leave the generators as they were."""
    before = random.getstate(), torch.random.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(before[0])
    torch.random.set_rng_state(before[1])
