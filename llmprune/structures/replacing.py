"""Let a resident decoder layer stand for the removed layers after it, by a linear map of its MLP's output."""

import time

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from llmprune.precision import float32_products
from llmprune.storage.report import MatchRow
from llmprune.stream.activations import HiddenStates
from llmprune.stream.resident import ResidentLayer
from llmprune.structures.find.mlp_outputs import MlpOutput
from llmprune.structures.remove.linear_map import LinearMap


def replace_run(
    layer: ResidentLayer, output: MlpOutput, inputs: HiddenStates, targets: HiddenStates, damping: float
) -> MatchRow:
    """Absorb the map into the matrices that write the MLP's output; they stay as they are if it does not help.

    Args:
        layer: resident, dense; changed in place.
        output: what writes its MLP's output; not refused.
        inputs: what the layer is run on, a tensor [samples, length, hidden] a batch.
        targets: the outputs of the last removed layer, likewise.
        damping: of the fit.

    Returns:
        The report row: the mean relative squared error of a token on the validation sequences (on all sequences if none
        are held back) without the map and with it.

    Raises:
        NumericsError: the fit is not unique, or an absorbed weight is not finite.
    """
    start = time.perf_counter()
    with torch.no_grad(), layer.stream.stages("solve"):
        before = relative_error(layer, inputs, targets)
        kept = {name: parameter.detach().clone() for name, parameter in _written(layer, output).items()}
        absorb(layer, output, _fitted(layer, output, inputs, targets, damping))
        after = relative_error(layer, inputs, targets)
        better = after < before
        if not better:
            for name, parameter in _written(layer, output).items():
                parameter.copy_(kept[name])
                layer.replaced.discard(name)
    return MatchRow(
        layer.name, "linear", before, after if better else before, 1, int(better), time.perf_counter() - start
    )


def _fitted(
    layer: ResidentLayer, output: MlpOutput, inputs: HiddenStates, targets: HiddenStates, damping: float
) -> Tensor:
    stream, fit = layer.stream, None
    for batch in stream.counted:
        full = run_layer(layer, inputs, batch)
        rest = run_layer(layer, inputs, batch, without=(*output.matrices, *output.biases))
        target = targets[batch].to(full.device).float().flatten(0, -2)
        fit = fit or LinearMap(full.shape[-1], full.device)
        with float32_products("ieee"):
            fit.add(full - rest, full, target)
    assert fit is not None, "there are calibration sequences"
    fit.collect(stream.settings.ranks)
    return fit.solve(damping)


def absorb(layer: ResidentLayer, output: MlpOutput, linear: Tensor) -> None:
    """Multiply an MLP's output by a map, in place.

    Args:
        layer: resident.
        output: what writes its MLP's output; not refused.
        linear: the map, float64 [hidden, hidden], on the layer's device.

    Raises:
        NumericsError: a new weight is not finite.
    """
    for name, matrix in layer.matrices.items():
        if matrix.parameter in output.matrices:
            layer.replace(name, (linear @ layer.weight(name).double()).float())
    parameters = dict(layer.module.named_parameters())
    for name in output.biases:
        bias = parameters[name].detach()
        bias.copy_(bias.double() @ linear.T)
        layer.replaced.add(name)


def relative_error(layer: ResidentLayer, inputs: HiddenStates, targets: HiddenStates) -> float:
    """The mean of ||y - t||^2 / ||t||^2 over the tokens of the validation sequences; of all, if none are held back.

    Args:
        layer: resident.
        inputs: what it is run on, a tensor [samples, length, hidden] a batch.
        targets: t, likewise.
    """
    stream = layer.stream
    held_back = stream.statistics_batches < len(stream.batches)
    total, tokens = 0.0, 0
    for batch in stream.validation if held_back else stream.own:
        found = run_layer(layer, inputs, batch)
        target = targets[batch].to(found.device).float().flatten(0, -2)
        size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        total += float(((found - target).square().sum(-1) / size).double().sum())
        tokens += len(target)
    sums = stream.settings.ranks.gather((total, tokens))
    return sum(total for total, _ in sums) / sum(tokens for _, tokens in sums)


def run_layer(layer: ResidentLayer, inputs: HiddenStates, batch: int, without: tuple[str, ...] = ()) -> Tensor:
    """The layer's outputs on one batch, float32 [tokens, hidden].

    Args:
        layer: resident.
        inputs: a tensor [samples, length, hidden] a batch.
        batch: which one.
        without: parameters that are taken to be zero.
    """
    args, kwargs = layer.stream.calls.get(layer.index, batch)
    parameters = dict(layer.module.named_parameters())
    zeros = {name: parameters[name].new_zeros(()).expand(parameters[name].shape) for name in without}
    hidden = inputs[batch].to(layer.stream.settings.device)
    output: Tensor = tree_leaves(functional_call(layer.module, zeros, (hidden, *args), kwargs))[0]
    return output.float().flatten(0, -2)


def _written(layer: ResidentLayer, output: MlpOutput) -> dict[str, Tensor]:
    parameters = dict(layer.module.named_parameters())
    return {name: parameters[name].detach() for name in (*output.matrices, *output.biases)}
