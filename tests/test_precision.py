"""In which dtype a model is computed, and what it is called."""

import pytest
import torch

from llmprune.precision import computed_in, dtype_name

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["old-cpu", "new-cpu"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor with, or without, instructions for 16-bit numbers."""
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: request.param, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return request.param


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_cpu_without_16_bit_instructions_computes_in_float32(native: bool, stored: torch.dtype) -> None:
    assert computed_in(stored, CPU) == (stored if native else torch.float32)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_wider_numbers_stay_as_they_are(native: bool, stored: torch.dtype) -> None:
    assert computed_in(stored, CPU) == stored


def test_a_gpu_computes_in_the_dtype_of_the_checkpoint(native: bool) -> None:
    assert computed_in(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_without_mkldnn_a_cpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert computed_in(torch.bfloat16, CPU) == torch.float32


def test_names_are_those_of_recipes() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
