"""Another library's `quantization_config` for checkpoints whose decoder layers differ in size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import save_packed
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from uneven_models import IDS, save_uneven

import llmprune  # noqa: F401 - registers with transformers
from llmprune.errors import ModelError
from llmprune.serving.quantizer import register


class CoarseConfig(QuantizationConfigMixin):
    """Of a library that rounds every linear weight to a multiple of 1/64."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = "coarse"


class CoarseLinear(nn.Linear):
    """What that library puts in the place of a linear layer."""


class CoarseQuantizer(HfQuantizer):
    """Replaces modules before the weights are loaded and rounds them after, as torchao and bitsandbytes do."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        assert not self.pre_quantized
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = CoarseLinear

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, CoarseLinear):
                module.weight.data = (module.weight.data * 64).round() / 64
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    AUTO_QUANTIZER_MAPPING["coarse"], AUTO_QUANTIZATION_CONFIG_MAPPING["coarse"] = CoarseQuantizer, CoarseConfig
    yield
    del AUTO_QUANTIZER_MAPPING["coarse"], AUTO_QUANTIZATION_CONFIG_MAPPING["coarse"]


def test_layers_of_their_own_sizes_are_quantised_as_they_are_loaded(tmp_path: Path) -> None:
    save_uneven(tmp_path / "uneven")
    register()  # again: nothing is wrapped twice
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven").eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven", quantization_config=CoarseConfig()).eval()
    assert [layer.mlp.up_proj.weight.shape[0] for layer in model.model.layers] == [44, 28]
    assert type(model.model.layers[1].mlp.up_proj) is CoarseLinear
    with torch.no_grad():
        for module in dense.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_((module.weight * 64).round() / 64)
        assert torch.equal(model(IDS, use_cache=False).logits, dense(IDS, use_cache=False).logits)
    assert type(model.config.quantization_config) is CoarseConfig
    # Both records in one config.json would describe a checkpoint that nothing can load.
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")


def test_packed_weights_are_refused_with_what_works(tmp_path: Path) -> None:
    folder = save_packed(tmp_path)
    with pytest.raises(ModelError, match="CoarseConfig for a packed checkpoint") as caught:
        AutoModelForCausalLM.from_pretrained(folder / "packed", quantization_config=CoarseConfig())
    assert "llmprune unpack" in caught.value.fix
    AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=CoarseConfig())


def test_other_records_are_merged_by_transformers(tmp_path: Path) -> None:
    folder = save_packed(tmp_path) / "dense"
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CoarseConfig())
    assert type(model.hf_quantizer) is CoarseQuantizer
    model.save_pretrained(tmp_path / "coarse")

    class Other(CoarseConfig):
        pass

    with pytest.raises(ValueError, match="quantized with CoarseConfig but you are passing a Other"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "coarse", quantization_config=Other())
