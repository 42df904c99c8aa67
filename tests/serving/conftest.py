"""What tests of decoder layers on a CPU share."""

import pytest
import torch

from llmprune.kernels.cpu import TokenLayer
from llmprune.serving import loader


@pytest.fixture
def computed_in_float32(monkeypatch):
    """As on a processor without instructions for 16-bit dtypes."""
    monkeypatch.setattr(loader, "computed_in", lambda stored, device: torch.float32)


@pytest.fixture
def counted(monkeypatch):
    """The tokens that the library took."""
    taken, begin = [], TokenLayer.begin
    monkeypatch.setattr(TokenLayer, "begin", lambda *operands: taken.append(1) or begin(*operands))
    return taken
