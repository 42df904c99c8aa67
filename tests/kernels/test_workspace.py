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
    assert not workspace.scratch(DEVICE, (16,), torch.uint8).is_inference()


def test_streams_do_not_share_memory(monkeypatch):
    workspace.reserve(DEVICE, 100, 8)
    first = workspace.scratch(DEVICE, (10,), torch.uint8)
    sums = workspace.partials(DEVICE, (2,))
    monkeypatch.setattr(workspace, "_stream", lambda device: 7)
    second = workspace.scratch(DEVICE, (10,), torch.uint8)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert workspace.partials(DEVICE, (2,)).data_ptr() != sums.data_ptr()
    assert workspace.reserved(DEVICE) == 2 * 108
    assert workspace.scratch(DEVICE, (100,), torch.uint8).data_ptr() == second.data_ptr()  # as reserved: did not grow
    workspace.release(DEVICE)
    assert workspace.reserved(DEVICE) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams that run at the same time")
def test_streams_of_a_gpu_do_not_share_memory():
    side = torch.cuda.Stream(DEVICE)
    here = workspace.scratch(DEVICE, (1000,), torch.uint8)
    with torch.cuda.stream(side):
        assert workspace.scratch(DEVICE, (1000,), torch.uint8).data_ptr() != here.data_ptr()


def test_a_graph_may_be_the_first_to_use_a_stream(monkeypatch):
    workspace.reserve(DEVICE, 100, 0)
    device = torch.device("cpu")
    buffer = workspace._Buffer("scratch", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(buffer, "device", torch.device("cuda", 7))
    monkeypatch.setattr(torch, "empty", lambda size, **_: torch.zeros(size, dtype=torch.uint8))
    assert len(buffer.view((60,), torch.uint8, reserved=100)) == 60
    assert len(buffer.memory) == 100
    with pytest.raises(RuntimeError, match="grow to 101 bytes while a CUDA graph is captured"):
        buffer.view((101,), torch.uint8, reserved=100)


def test_growing_inside_a_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(workspace, "_stream", lambda device: 0)
    device = torch.device("cuda", 7)
    with pytest.raises(RuntimeError, match=r"grow to 8 bytes while a CUDA graph is captured(.|\n)*fix: reserve"):
        workspace.scratch(device, (4,), torch.float16)
    workspace.release(device)
