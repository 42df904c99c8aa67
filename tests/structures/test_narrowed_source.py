"""A checkpoint with fewer hidden channels: streamed, written and loaded like a model narrowed in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import same, tensors
from narrowing import CHANNELS, factors_of, narrowed
from safetensors.torch import load_file, save_file
from tiny_models import build, random_ids, save
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.errors import CheckpointError, PatternError
from llmprune.measuring.perplexity import run_stream
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.progress import ignore
from llmprune.stream.stream import StreamSettings
from llmprune.structures.narrowed_source import WidthSource
from llmprune.structures.remove.width import plan_width

CPU, IDS = torch.device("cpu"), random_ids(3, 16)
# Tied, LayerNorm with biases, one added to the gain, experts that are fused on loading, buffers, a mixture of dtypes.
FAMILIES = ["llama-tied", "phi", "nemotron", "mixtral", "deepseek_v3", "gpt_oss", "rwkv"]


def narrow(folder: Path, compute_dtype: torch.dtype | None = None) -> WidthSource:
    inner = CheckpointSource(folder, compute_dtype)
    width = plan_width(inner.config, len(CHANNELS))
    return WidthSource(inner, width, CHANNELS, factors_of(width))


def streamed(source: WidthSource) -> list[Tensor]:
    run = run_stream(source, IDS, StreamSettings(batch_size=2), ignore, "test")
    return [logits for _, (logits,) in run.logits(run.hidden)]


def direct(model: PreTrainedModel) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits for ids in IDS.split(2)]


def written(source: WidthSource, folder: Path) -> Path:
    """The checkpoint of the smaller model."""
    stored = source.end_tensors()
    for index in range(len(source.layers)):
        source.load_layer(index, CPU)
        stored |= source.checkpoint_tensors(index)
        source.free_layer(index)
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, folder / "model.safetensors")
    source.config.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_written_and_loaded(family: str, tmp_path: Path) -> None:
    model = build(family)
    source = narrow(save(model, tmp_path / "full"))
    width = source._width
    found = streamed(source)
    in_memory = narrowed(model, width, CHANNELS, factors_of(width))
    assert all(torch.equal(*pair) for pair in zip(found, direct(in_memory), strict=True))
    folder = written(source, tmp_path / "narrow")
    assert set(tensors(folder)) == set(tensors(tmp_path / "full"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    assert all(torch.equal(*pair) for pair in zip(found, direct(loaded), strict=True))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_gains_are_computed_as_they_will_be_stored(compute: torch.dtype, tmp_path: Path) -> None:
    source = narrow(save(build("llama-tied", torch.bfloat16), tmp_path / "full"), compute)
    found = streamed(source)
    folder = written(source, tmp_path / "narrow")
    assert {tensor.dtype for tensor in tensors(folder).values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=compute).eval()
    assert all(torch.equal(*pair) for pair in zip(found, direct(loaded), strict=True))


def test_one_layer_or_the_ends_are_in_memory(tmp_path: Path) -> None:
    source = narrow(save(build("llama"), tmp_path))

    def loaded(model: PreTrainedModel) -> set[str]:
        return {name for name, parameter in model.named_parameters() if not parameter.is_meta}

    source.load_layer(1, CPU)
    assert loaded(source.model) == {f"model.layers.1.{name}" for name, _ in source.layers[1].named_parameters()}
    source.free_layer(1)
    source.load_ends(CPU)
    assert loaded(source.model) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    source.free_ends()
    assert loaded(source.model) == loaded(source._inner.model) == set()


def test_the_full_layer_is_dropped_and_shares_no_memory(tmp_path: Path) -> None:
    source = narrow(save(build("qwen3"), tmp_path))
    source.load_layer(0, CPU)
    assert all(parameter.is_meta for parameter in source._inner.model.parameters())
    name = "self_attn.q_norm.weight"  # nothing of it goes
    source.layers[0].get_parameter(name).data.zero_()
    source.load_layer(0, CPU)
    assert bool(source.layers[0].get_parameter(name).any())


def test_a_failure_drops_the_full_layer(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path)
    source = narrow(folder)
    # Cut off behind our back.
    rewrite(folder, lambda stored: {"lm_head.weight": stored["lm_head.weight"]})
    with pytest.raises(CheckpointError, match="it ends before the values of"):
        source.load_layer(0, CPU)
    assert all(parameter.is_meta for parameter in source._inner.model.parameters())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source = narrow(save(build("llama-tied"), tmp_path))
    source.load_ends(CPU)
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    assert source.model.lm_head.weight.shape == (128, len(CHANNELS))
    source.free_ends()
    assert source.model.lm_head.weight.is_meta
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    assert "lm_head.weight" not in source.end_tensors()


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    folder = save(build("llama", torch.bfloat16), tmp_path)
    source = narrow(folder, torch.float32)
    assert (source.folder, source.layers_path, source.layer_name(1)) == (folder, "model.layers", "model.layers.1")
    assert (source.config.hidden_size, source.model.dtype) == (len(CHANNELS), torch.float32)
    assert source.stored_dtype(0, "mlp.up_proj.weight") == torch.bfloat16


def test_ends_in_dtypes_of_their_own_beside_strangers(tmp_path: Path) -> None:
    """A wider embedding is not rounded by the way; what the model does not know is none of its tensors."""
    folder = save(build("llama", torch.bfloat16), tmp_path)
    wide = torch.rand(128, 32)
    strange = {"model.embed_tokens.weight": wide, "model.mtp.weight": torch.rand(64, 32)}
    rewrite(folder, lambda stored: {**stored, **strange})
    ends = narrow(folder).end_tensors()
    assert set(ends) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert same(ends["model.embed_tokens.weight"], wide[:, CHANNELS])
    assert same(ends["lm_head.weight"], tensors(folder)["lm_head.weight"][:, CHANNELS])


def test_ends_in_another_form_are_refused(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path)
    rewrite(folder, lambda stored: {**stored, "lm_head.weight": stored["lm_head.weight"].T.contiguous()})
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' \[32, 128\] is stored in a different layout"):
        narrow(folder).end_tensors()


def test_channels_that_do_not_fit_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    inner = CheckpointSource(save(build("llama"), tmp_path))
    width = plan_width(inner.config, len(CHANNELS))
    with pytest.raises(PatternError, match="24 ascending numbers"):
        WidthSource(inner, width, CHANNELS[1:], factors_of(width))
