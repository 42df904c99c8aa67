"""Names of devices."""

import pytest
import torch

from llmprune.devices import resolve_device
from llmprune.errors import DeviceError


def test_auto_is_what_there_is() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:x", "", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=f"device {name!r}"):
        resolve_device(name)
