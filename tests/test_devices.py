"""Names of devices."""

import pytest
import torch

from llmprune.devices import describe_device, resolve_device
from llmprune.errors import DeviceError


@pytest.mark.parametrize(("count", "said"), [(1, "1 thread"), (2, "2 threads")])
def test_a_cpu_says_its_threads(monkeypatch: pytest.MonkeyPatch, count: int, said: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert describe_device(torch.device("cpu")).endswith(f", {said}")


def test_auto_is_what_there_is() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:x", "", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=f"device {name!r}"):
        resolve_device(name)
