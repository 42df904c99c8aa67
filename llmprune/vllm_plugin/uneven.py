"""Models whose decoder layers differ in size or lack a block, on vLLM's Transformers backend.

vLLM's own model classes build all layers alike. Its Transformers backend builds a model of transformers, and replaces
linear layers, attention and norms in it. Between the two, the decoder layers get their own sizes.

Imported by `register` only, since it needs vLLM.
"""

from typing import Any

from torch import nn
from transformers import PretrainedConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.transformers import TransformersForCausalLM

from llmprune.models.decoder import Decoder
from llmprune.models.skeleton import build_skeleton
from llmprune.models.uneven import RemovedBlock, apply_per_layer, read_per_layer, with_per_layer

ARCHITECTURE = "LlmpruneForCausalLM"


class LlmpruneForCausalLM(TransformersForCausalLM):  # type: ignore[misc] # vLLM is not installed here
    """A causal LM with the layers that `per_layer_config` describes."""

    def _create_hf_to_vllm_mapper(self) -> None:
        # The first thing that the backend does with the model it has built.
        resize(self.model, self.config)
        super()._create_hf_to_vllm_mapper()

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Create attention for the layers that have it; the backend insists on one for each layer."""
        known = self.compilation_config.static_forward_context
        before, added = set(known), {}
        for number, (name, block) in _without_attention(self.model, self.attention_fusers).items():
            self.attention_fusers[number] = (f"model.{name}", _NoAttention())
            added[number] = block
        super()._create_attention_instances(prefix)
        for number, block in added.items():
            layer, _ = self.attention_fusers.pop(number)
            # Without it, no cache is allocated for this layer.
            for key in set(known) - before:
                if known[key] is block.attn:
                    assert key.endswith(f"{layer}.attn")
                    del known[key]
            del block.attn


class _NoAttention:
    """What the backend asks of an attention module, for a block that is gone."""

    def scale(self, module: nn.Module) -> float:
        return 1.0

    def sinks(self, module: nn.Module) -> None:
        return None


def register() -> None:
    """Make vLLM know the model class."""
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:{LlmpruneForCausalLM.__name__}")


def redirect(config: Any) -> None:
    """Let vLLM build a model by this class, in place, if its decoder layers differ."""
    if isinstance(config, PretrainedConfig) and read_per_layer(config):
        config.architectures = [ARCHITECTURE]


def resize(model: nn.Module, config: PretrainedConfig) -> None:
    """Give the decoder layers of a model without its head their own sizes, in place, on the meta device."""
    whole = Decoder.find(build_skeleton(with_per_layer(config, {})))
    inner = whole.path.removeprefix(f"{whole.model.base_model_prefix}.")
    layers = model.get_submodule(inner)
    assert isinstance(layers, nn.ModuleList)
    apply_per_layer(Decoder(model, whole.path, layers), config)


def _without_attention(model: nn.Module, attention: dict[int, Any]) -> dict[int, tuple[str, RemovedBlock]]:
    """The layers of which attention was removed: their numbers, and one removed block of each with its name."""
    found: dict[int, tuple[str, RemovedBlock]] = {}
    for name, module in model.named_modules():
        if isinstance(module, RemovedBlock) and module.layer_idx not in attention:
            found.setdefault(module.layer_idx, (name, module))
    return found
