"""What all tests share: shape annotations that are executed, and fixed seeds."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from fresh_processes import FreshProcesses
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
        "llmprune.rotation",
        "llmprune.storage.formats",
        # Not all of `structures`: its tracing is called for every operation, and has no shapes to check.
        "llmprune.structures.choose.scores",
        "llmprune.structures.remove.solver",
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# Thousands of small checkpoints are written and removed: in memory, where there is room for them.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

settings.register_profile("llmprune", derandomize=True, database=None, deadline=None)
settings.load_profile("llmprune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker waits for another at the end."""
    long = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "families")))}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """Start every test from the same seeds, and leave the generators as they were."""
    before = random.getstate(), torch.random.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(before[0])
    torch.random.set_rng_state(before[1])


@pytest.fixture(scope="session")
def run_fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """Run programs that have imported nothing of llmprune."""
    with ExitStack() as stack:
        yield FreshProcesses(tmp_path_factory.mktemp("fresh"), stack)
