import pytest
import torch

from llmprune.kernels import workspace

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def own_memory():
    workspace.release(DEVICE)
    yield
    workspace.release(DEVICE)


def test_all_callers_share_the_memory():
    first = workspace.scratch(DEVICE, (4, 8), torch.float16)
    second = workspace.scratch(DEVICE, (8,), torch.bfloat16)
    assert first.data_ptr() == second.data_ptr()
    assert (first.shape, first.dtype) == ((4, 8), torch.float16)
    assert workspace.partials(DEVICE, (2, 3)).dtype == torch.float32
    assert workspace.partials(DEVICE, (2,)).data_ptr() != first.data_ptr()
    assert workspace.partials(DEVICE, (0,)).shape == (0,)


def test_reserving_less_changes_nothing():
    workspace.reserve(DEVICE, 1000, 64)
    address = workspace.scratch(DEVICE, (500,), torch.float16).data_ptr()
    workspace.reserve(DEVICE, 10, 10)
    assert workspace.scratch(DEVICE, (500,), torch.float16).data_ptr() == address
    assert workspace.reserved(DEVICE) == 1064


def test_memory_that_nobody_saw_is_given_back_when_it_grows():
    for size in (100, 1000):
        workspace.reserve(DEVICE, size, 0)
    assert workspace.reserved(DEVICE) == 1000


def test_memory_that_a_graph_may_hold_is_kept():
    seen = workspace.scratch(DEVICE, (100,), torch.uint8)
    seen.fill_(7)
    workspace.scratch(DEVICE, (1000,), torch.uint8).fill_(9)
    assert (seen == 7).all()
    assert workspace.reserved(DEVICE) == 1100
    workspace.release(DEVICE)
    assert workspace.reserved(DEVICE) == 0


def test_nothing_on_meta():
    workspace.reserve(torch.device("meta"), 1000, 1000)
    assert workspace.reserved(torch.device("meta")) == 0


def test_memory_outlives_inference_mode():
    with torch.inference_mode():
        workspace.reserve(DEVICE, 16, 16)
    assert not workspace._scratch[DEVICE].memory.is_inference()


def test_growing_inside_a_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 7)
    with pytest.raises(RuntimeError, match=r"grow to 8 bytes while a CUDA graph is captured(.|\n)*fix: reserve"):
        workspace.scratch(device, (4,), torch.float16)
    workspace.release(device)
