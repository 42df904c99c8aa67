"""Fold the gains of norms, and absorb a rotation, into the parameters of a checkpoint: in float64, rounded once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.errors import CheckpointError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.rotation.loss import HeadIndex
from llmprune.rotation.search import Rotation
from llmprune.structures.find.residual_reads import Values, reading_dim
from llmprune.structures.residual import Residual

# Rows of an embedding that are rotated at once: in float64, a large vocabulary would take gigabytes.
_ROWS = 16_384


def fold_layer(residual: Residual, layer: nn.Module, name: str) -> None:
    """Fold the gains of a resident layer's norms into what reads them, in place; it computes the same.

    Args:
        residual: of its model.
        layer: float32 or wider.
        name: its dotted name.
    """
    _change(residual, layer, name, lambda parameter, tensor, dtype: tensor.to(dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """A checkpoint with a rotation absorbed into it.

    Attributes:
        source: the checkpoint, its layers in float32 or wider.
        residual: of its model.
        rotation: of the residual stream, and of the values of some layers.
    """

    source: CheckpointSource
    residual: Residual
    rotation: Rotation

    def layer_tensors(self, index: int) -> dict[str, Tensor]:
        """A layer under the checkpoint's keys and in its dtypes; the layer must be loaded, and is changed in place.

        Args:
            index: number of the layer.

        Raises:
            CheckpointError: the conversion does not reproduce the checkpoint's keys.
        """
        layer, name = self.source.layers[index], self.source.layer_name(index)
        stream = self.rotation.stream

        def turn(parameter: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
            tensor = self.residual.turned(parameter, tensor, stream.to(tensor.device))
            return self._with_heads(index, parameter.removeprefix(f"{name}."), tensor)

        dtypes = {parameter: parameter.dtype for parameter in layer.parameters()}
        _change(self.residual, layer, name, turn)
        tensors = self.source.checkpoint_tensors(index, [key for key, _ in layer.named_parameters()])
        for parameter, dtype in dtypes.items():
            # The source loads the next values in the dtype of these.
            parameter.data = parameter.data.to(dtype)
        return tensors

    def end_tensors(self) -> dict[str, Tensor]:
        """Everything outside the layers under the checkpoint's keys and in its dtypes, with an LM head of its own.

        Raises:
            CheckpointError: a tensor with hidden channels is not stored in the model's layout.
        """
        source, head = self.source, self.residual.tied
        stored = {key: source.targets[key] for key in source.end_keys()}
        if head is None:
            return {key: self._end(key, names[0]) for key, names in stored.items()}
        model = source.model
        embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        key = next(key for key, names in stored.items() if f"{embeddings}.weight" in names)
        own = {key: self._end(key, names[0]) for key, names in stored.items() if head not in names}
        return {**own, key: self._end(key, f"{embeddings}.weight"), head: self._end(key, head)}

    def _end(self, key: str, name: str) -> Tensor:
        """A stored tensor as what its parameter becomes."""
        tensor = self.source.stored[key][...]
        residual = self.residual
        if name not in residual.places and name not in residual.offsets:
            return tensor
        if tensor.shape != self.source.model.get_parameter(name).shape:
            raise CheckpointError(
                f"{self.source.folder}: {key!r} {list(tensor.shape)} is stored in a different layout from {name}",
                expected="embeddings, norms and LM head in the model's own layout",
                fix="load the model with transformers, save it with save_pretrained, and rotate that copy",
            )
        fold = residual.folds.get(name)
        gains = {} if fold is None else {fold.gain: self._gain(fold.gain)}
        for rows in tensor.split(_ROWS):
            rows.copy_(residual.turned(name, residual.folded(name, rows.double(), gains), self.rotation.stream.cpu()))
        return tensor

    def _gain(self, name: str) -> Tensor:
        return next(self.source.stored[key][...] for key, names in self.source.targets.items() if name in names)

    def _with_heads(self, index: int, parameter: str, tensor: Tensor) -> Tensor:
        """A parameter of a layer with the values of attention rotated."""
        values = self.residual.values.get(index)
        if values is None or index not in self.rotation.heads:
            return tensor
        heads = self.rotation.heads[index].to(tensor.device)
        transposed = f"{self.source.layer_name(index)}.{parameter}" in self.residual.transposed
        if parameter == values.bias:
            return value_rows(values).rotate(tensor, heads, 0)
        if parameter == values.producer:
            # Never fused from several experts: its rows are numbered within one matrix.
            tensor = value_rows(values).rotate(tensor, heads, 1 if transposed else 0)
        if parameter == values.consumer:
            tensor = value_columns(values).rotate(tensor, heads, reading_dim(tensor.shape, transposed))
        return tensor


def value_rows(values: Values) -> HeadIndex:
    """The outputs of V."""
    return HeadIndex(values.rows[:, None])


def value_columns(values: Values) -> HeadIndex:
    """The inputs of O."""
    return HeadIndex(values.columns)


def _change(
    residual: Residual, layer: nn.Module, name: str, finish: Callable[[str, Tensor, torch.dtype], Tensor]
) -> None:
    """Replace each parameter by what `finish` makes of its folded value, in float64; one at a time."""
    parameters = {f"{name}.{key}": parameter for key, parameter in layer.named_parameters()}
    gains = {key: parameters[key].detach().clone() for key in residual.offsets if key in parameters}
    for key, parameter in parameters.items():
        folded = residual.folded(key, parameter.detach().double(), gains)
        parameter.data = finish(key, folded, parameter.dtype)
