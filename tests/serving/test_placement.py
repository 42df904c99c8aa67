"""Device maps: the same model, wherever its layers are, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from llmprune import load
from llmprune.errors import DeviceError
from llmprune.serving.loader import Sampling, load_tokenizer, write
from llmprune.serving.placement import input_device, require_placement

IDS = torch.arange(4, 12).view(1, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers."""
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "cpu",
        {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "cpu"},
    ],
    ids=["auto", "cpu", "disk"],
)  # fmt: skip
def test_a_model_shared_out_is_the_same_model(device_map: Any, folder: Path) -> None:
    kwargs: dict[str, Any] = {"device_map": device_map}
    model, plain = load(folder, **kwargs), load(folder, device="cpu")
    assert input_device(model) == torch.device("cpu") or torch.cuda.is_available()
    with torch.no_grad():
        found = model(IDS.to(input_device(model))).logits.cpu()
        torch.testing.assert_close(found, plain(IDS).logits)
    tokenizer, sampling = load_tokenizer(folder), Sampling(max_new_tokens=4, temperature=0)
    assert write(model, tokenizer, IDS, sampling).text == write(plain, tokenizer, IDS, sampling).text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "atuo"}, "device_map 'atuo'"),
        ({"device_map": "cuda:99"}, "device_map 'cuda:99'"),
        ({"device_map": "auto", "device": "cpu"}, "device 'cpu' and device_map 'auto'"),
        ({"device_map": "auto", "graphs": True}, "CUDA graphs with device_map"),
    ],
)
def test_refused(options: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(DeviceError, match=said) as caught:
        load(folder, **options)
    assert caught.value.fix


def test_accelerate_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.serving.placement.is_accelerate_available", lambda: False)
    with pytest.raises(DeviceError, match="without the package accelerate") as caught:
        require_placement("auto", "auto")
    assert "pip install accelerate" in caught.value.fix
    assert require_placement("cpu", None) == torch.device("cpu")
